"""Does the gate hold still, and does it notice what tolerance lets pass? Two tables, on the committed golden.

1. One machine made to compute as others do: thread counts, XLA's optimisation levels, instruction sets, fast math.
   Every run is compared with the committed baseline, and a run that does not pass is a false alarm. How far the errors
   move among these runs is what the bands in ``parity/tolerances.py`` are derived from.
2. Computations made a little less exact, as a careless change would, in one place each.

Run: python -m benchmarks.gate [--baseline FILE] [NAME ...]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import dsv4_convert.golden as golden_package
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint

GOLDEN = Path(golden_package.__file__).parent / "data" / "tiny"
BASELINE = GOLDEN.with_name("tiny.baseline.json")
DTYPES = ("float32", "bfloat16")

#: What to set XLA_FLAGS to, and the command that the run is put behind.
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "as it is": ("", ()),
    "the same again": ("", ()),
    "one core": ("", ("taskset", "-c", "0")),
    "one thread": ("--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1", ()),
    "two devices, a mesh": ("--xla_force_host_platform_device_count=2", ()),
    "optimisation level 0": ("--xla_backend_optimization_level=0", ()),
    "optimisation level 1": ("--xla_backend_optimization_level=1", ()),
    "SSE4.2": ("--xla_cpu_max_isa=SSE4_2", ()),
    "SSE4.2, optimisation level 0": ("--xla_cpu_max_isa=SSE4_2 --xla_backend_optimization_level=0", ()),
    "AVX": ("--xla_cpu_max_isa=AVX", ()),
    "AVX2": ("--xla_cpu_max_isa=AVX2", ()),
    "vectors of 128 bits": ("--xla_cpu_prefer_vector_width=128", ()),
    "vectors of 512 bits": ("--xla_cpu_prefer_vector_width=512", ()),
    "without fusion emitters": ("--xla_cpu_use_fusion_emitters=false", ()),
    "fast math": ("--xla_cpu_enable_fast_math=true", ()),
    "fast math, all of it": (
        "--xla_cpu_enable_fast_math=true --xla_cpu_fast_math_honor_division=false "
        "--xla_cpu_fast_math_honor_functions=false --xla_cpu_enable_fast_min_max=true",
        (),
    ),
}


def _everywhere(function: Callable[..., Any], replacement: Callable[..., Any]) -> None:
    """Replace a function of the model wherever a module has it under its name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("dsv4_convert.model") and getattr(module, function.__name__, None) is function:
            setattr(module, function.__name__, replacement)


def _replace(module: Any, name: str, value: Any) -> None:
    setattr(module, name, value)


def _rounded(value: Any) -> Any:
    import jax
    import jax.numpy as jnp

    # A barrier, because XLA leaves out a conversion that is followed by the one back.
    return jax.lax.optimization_barrier(value.astype(jnp.bfloat16)).astype(jnp.float32)


def _three_passes() -> None:
    """Float32 products of three products of bfloat16, as ``--precision high`` has them on a TPU."""
    import jax
    import jax.numpy as jnp

    from dsv4_convert.model import ops

    exact = ops.einsum_f32

    def einsum_f32(spec: str, a: Any, b: Any) -> Any:
        if not a.dtype == b.dtype == jnp.float32:
            return exact(spec, a, b)
        high = [_rounded(part) for part in (a, b)]
        low = [_rounded(jax.lax.optimization_barrier(part - top)) for part, top in zip((a, b), high, strict=True)]
        return exact(spec, high[0], high[1]) + (exact(spec, high[0], low[1]) + exact(spec, low[0], high[1]))

    _everywhere(exact, einsum_f32)


def _eps_of_norms() -> None:
    """The eps of all norms as bfloat16 holds it: 0.00099945 instead of 0.001."""
    import ml_dtypes

    from dsv4_convert.model import norm

    exact = norm.rms_scale
    _everywhere(exact, lambda x, eps: exact(x, float(ml_dtypes.bfloat16(eps))))


def _root() -> None:
    """A reciprocal root with three bits less, as fast ones have it."""
    import jax
    import jax.numpy as jnp

    from dsv4_convert.model import norm

    exact = norm.rms_scale

    def rms_scale(x: Any, eps: float) -> Any:
        bits = jax.lax.bitcast_convert_type(exact(x, eps), jnp.int32) & ~7
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    _everywhere(exact, rms_scale)


def _epsilon() -> None:
    """The 1e-20 beside the sum of routing weights, which changes no float32, is 1e-6."""
    import jax.numpy as jnp

    from dsv4_convert.model import router

    class Numpy:
        def __getattr__(self, name: str) -> Any:
            return getattr(jnp, name)

        def sum(self, *arguments: Any, **options: Any) -> Any:
            return jnp.sum(*arguments, **options) + 1e-6

    _replace(router, "jnp", Numpy())


def _softplus() -> None:
    """log(1 + exp(x)) as it is written, where softplus keeps the digits of small ones."""
    import jax
    import jax.numpy as jnp

    from dsv4_convert.model import router

    class Networks:
        def __getattr__(self, name: str) -> Any:
            return getattr(jax.nn, name)

        def softplus(self, x: Any) -> Any:
            return jnp.log(1 + jnp.exp(x))

    class Jax:
        nn = Networks()

        def __getattr__(self, name: str) -> Any:
            return getattr(jax, name)

    _replace(router, "jax", Jax())


def _sinkhorn() -> None:
    """The mixing of the streams in bfloat16."""
    import jax
    import jax.numpy as jnp

    from dsv4_convert.model import hyper_connection

    def sinkhorn(logits: Any, iterations: int, eps: float) -> Any:
        c = _rounded(jax.nn.softmax(logits, axis=-1) + eps)
        c = _rounded(c / (jnp.sum(c, axis=-2, keepdims=True) + eps))
        for _ in range(iterations - 1):
            c = _rounded(c / (jnp.sum(c, axis=-1, keepdims=True) + eps))
            c = _rounded(c / (jnp.sum(c, axis=-2, keepdims=True) + eps))
        return c

    _everywhere(hyper_connection.sinkhorn, sinkhorn)


def _result(home: str, name: str) -> None:
    """Round the results of a function of the model to bfloat16."""
    import importlib

    function = getattr(importlib.import_module(f"dsv4_convert.model.{home}"), name)
    _everywhere(function, lambda *arguments, **options: _rounded(function(*arguments, **options)))


def _angles() -> None:
    """Sine and cosine of the rotary angles rounded."""
    import jax.numpy as jnp

    from dsv4_convert.model import rope

    class Numpy:
        def __getattr__(self, name: str) -> Any:
            return getattr(jnp, name)

        def cos(self, x: Any) -> Any:
            return _rounded(jnp.cos(x))

        def sin(self, x: Any) -> Any:
            return _rounded(jnp.sin(x))

    _replace(rope, "jnp", Numpy())


#: dtype of the run, and what is planted.
PLANTED: dict[str, tuple[str, Callable[[], None]]] = {
    "products of three bfloat16 passes": ("float32", _three_passes),
    "eps of norms held in bfloat16": ("float32", _eps_of_norms),
    "reciprocal root with three bits less": ("float32", _root),
    "1e-6 for 1e-20 beside a sum": ("float32", _epsilon),
    "log(1 + exp(x)) for softplus": ("float32", _softplus),
    "Sinkhorn iterations rounded to bfloat16": ("bfloat16", _sinkhorn),
    "statistics of norms rounded to bfloat16": ("bfloat16", partial(_result, "norm", "rms_scale")),
    "mixing weights rounded to bfloat16": ("bfloat16", partial(_result, "hyper_connection", "_project")),
    "rotary cos and sin rounded to bfloat16": ("bfloat16", _angles),
    "attention scores rounded to bfloat16": ("bfloat16", partial(_result, "attention", "_scores")),
}


def one(source: Path, dtype: str, baseline: Path, planted: str | None) -> dict[str, Any]:
    """One parity run in this process: what tolerance and baseline say, and every number."""
    from dsv4_convert.golden.noise import MODES
    from dsv4_convert.parity.gate import BaselineRequest, bands_of, numbers_of
    from dsv4_convert.parity.report.words import verdict
    from dsv4_convert.parity.run import ParityOptions, run_parity
    from dsv4_convert.parity.tolerances import BANDS_OF_FEW

    if planted is not None:
        PLANTED[planted][1]()
    report = run_parity(
        None, GOLDEN, ParityOptions(modes=MODES, dtype=dtype), source=source, baseline=BaselineRequest(path=baseline)
    )
    assert report.gate is not None
    numbers = {f"{tap.mode} {tap.name}": numbers_of(tap) for tap in report.taps}
    few = [f"{tap.mode} {tap.name}" for tap in report.taps if bands_of(tap) is BANDS_OF_FEW]
    return {
        "agrees": report.agrees,
        "gate": report.gate.passed,
        "grown": len(report.gate.grown),
        "first": f"{report.gate.grown[0].mode} {report.gate.grown[0].name}" if report.gate.grown else "",
        "sentence": verdict(report),
        "numbers": numbers,
        "few": few,
    }


def _apart(arguments: list[str], flags: str, before: tuple[str, ...]) -> dict[str, Any]:
    """:func:`one` in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [*before, sys.executable, "-m", "benchmarks.gate", "--out", out.name, *arguments]
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return json.loads(Path(out.name).read_text(encoding="utf-8"))


def _recorded(baseline: Path, dtype: str) -> dict[str, dict[str, float]]:
    """The numbers of a baseline file by mode and tap."""
    entries = json.loads(baseline.read_text(encoding="utf-8"))["measured"]
    return {
        f"{entry['mode']} {name}": numbers
        for entry in entries
        if entry["platform"] == "cpu" and entry["dtype"] == dtype
        for name, numbers in entry["taps"].items()
    }


def _worst(found: dict[str, Any], recorded: dict[str, dict[str, float]]) -> dict[str, float]:
    """By measure, the largest part of what is allowed that was reached."""
    from dsv4_convert.parity.tolerances import BANDS, BANDS_OF_FEW

    worst = dict.fromkeys(BANDS, 0.0)
    for name, numbers in found["numbers"].items():
        bands = BANDS_OF_FEW if name in found["few"] else BANDS
        for measure, number in (numbers or {}).items():
            share = number / bands[measure].allowed(recorded[name][measure])
            worst[measure] = max(worst[measure], share)
    return worst


def _spread(runs: list[dict[str, Any]], *, few: bool) -> dict[str, float]:
    """By measure, the largest of all runs over the smallest, of the tap where that is most; of taps of few elements, or
    of the others."""
    from dsv4_convert.parity.tolerances import BANDS

    spread = dict.fromkeys(BANDS, 1.0)
    for name, numbers in runs[0]["numbers"].items():
        for measure in numbers or {}:
            values = [run["numbers"][name][measure] for run in runs]
            # `least` covers errors far below the floor.
            if (name in runs[0]["few"]) is few and min(values) > (0.01 if measure != "tokens" else 0):
                spread[measure] = max(spread[measure], max(values) / min(values))
    return spread


def main() -> None:
    """Run what was chosen, print the tables and the counts as JSON."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names; everything if none is given")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--planted", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out is not None:
        found = one(options.source, options.dtype, options.baseline, options.planted)
        options.out.write_text(json.dumps(found, default=str), encoding="utf-8")
        return

    def chosen(name: str) -> bool:
        return not options.names or any(part in name for part in options.names)

    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "checkpoint"
        write_checkpoint(source, tiny_config(), seed=0)
        common = ["--source", str(source), "--baseline", str(options.baseline.resolve())]

        def compared(dtype: str, name: str, flags: str = "", before: tuple[str, ...] = (), plant: bool = False) -> Any:
            print(f"{name}, {dtype} …", file=sys.stderr, flush=True)
            planted = ["--planted", name] if plant else []
            return _apart([*common, "--dtype", dtype, *planted], flags, before)

        plain = {dtype: compared(dtype, "as it is") for dtype in DTYPES}
        rows: dict[str, list[tuple[str, dict[str, Any]]]] = {dtype: [] for dtype in DTYPES}
        for name, (flags, before) in VARIANTS.items():
            for dtype in DTYPES if chosen(name) else ():
                found = plain[dtype] if name == "as it is" else compared(dtype, name, flags, before)
                rows[dtype].append((name, found))
        for dtype in DTYPES:
            if rows[dtype]:
                recorded = _recorded(options.baseline, dtype)
                console.print(_variants(dtype, rows[dtype], plain[dtype], recorded, Table))
        planted = [
            (name, dtype, compared(dtype, name, plant=True)) for name, (dtype, _) in PLANTED.items() if chosen(name)
        ]
    table = Table(title="made less exact in one place", title_justify="left", box=None)
    for column in ("what", "dtype", "tolerance", "baseline", "taps", "the first of them"):
        table.add_column(column)
    for name, dtype, found in planted:
        caught = "caught" if not found["gate"] else "passes"
        table.add_row(
            name, dtype, "passes" if found["agrees"] else "caught", caught, str(found["grown"]), found["first"]
        )
    console.print(table)
    every = [found for dtype in DTYPES for _, found in rows[dtype]]
    within = [found for _, _, found in planted if found["agrees"]]
    counts = {
        "runs": len(every),
        "false_alarms": sum(not (found["gate"] and found["agrees"]) for found in every),
        "planted_within_tolerance": len(within),
        "caught_by_baseline": sum(not found["gate"] for found in within),
    }
    print(json.dumps(counts))


def _variants(
    dtype: str,
    rows: list[tuple[str, dict[str, Any]]],
    plain: dict[str, Any],
    recorded: dict[str, dict[str, float]],
    table_of: Any,
) -> Any:
    table = table_of(title=f"{dtype}: largest part of what is allowed", title_justify="left", box=None)
    for column in ("how", "equal", "tap", "row", "element", "tokens", "verdict"):
        table.add_column(column, justify="left" if column in ("how", "verdict") else "right")
    for name, found in rows:
        equal = math.fsum(numbers == plain["numbers"][tap] for tap, numbers in found["numbers"].items())
        shares = (f"{share:.2f}" for share in _worst(found, recorded).values())
        good = found["agrees"] and found["gate"]
        table.add_row(
            name, f"{equal / len(found['numbers']):.0%}", *shares, "pass" if good else f"FALSE ALARM {found['first']}"
        )
    for few, what in ((False, "largest over smallest of all"), (True, "of taps of few elements")):
        spread = _spread([found for _, found in rows], few=few)
        table.add_row(what, "", *(f"{ratio:.2f}" for ratio in spread.values()), "")
    return table


if __name__ == "__main__":
    main()
