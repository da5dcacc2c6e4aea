"""The program of a parity run compiled for TPUs that are not there: one layer of V4-Flash in float32, with its taps.

A row is a layer as ``dsv4 parity --program model`` runs it on the devices of one slice: one prompt of 256 tokens for
each device, or one token from a cache of 256; also without taps, as ``generate`` has it, and from codes. Memory is of
one device, by libtpu's own compiler. Needs libtpu (``pip install 'dsv4-convert[tpu]'``) and no TPU.

Run: python -m benchmarks.parity_compile [--only v6e] [--tokens 256]
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.topologies import CONFIGS, MODELS
from dsv4_convert.aot import Slice
from dsv4_convert.aot.report import Memory
from dsv4_convert.spec.config import Config
from tests.aot.parity_layer import Job, compile_layer

_SLICES = {"v5p-8": {"expert": 4}, "v6e-8": {"expert": 8}}
_LAYERS = {"CSA": 20, "HCA": 21}
#: Form of a program -> its options; without any it runs prompts, with expanded weights and taps.
_FORMS: dict[str, dict[str, Any]] = {
    "prompt, taps": {},
    "prompt": {"recorded": False},
    "prompt, taps, codes": {"encoded": True},
    "one token, taps": {"decode": True},
}
#: Columns of the table.
_WIDTH = 120
_GIB = 2**30


def _memory(config: Config, job: Job) -> dict[str, Any]:
    """GiB of one device, seconds, or the compiler's refusal."""
    start = time.process_time()
    try:
        memory = Memory.of(compile_layer(config, job))
    except jax.errors.JaxRuntimeError as refusal:
        if not str(refusal).startswith("RESOURCE_EXHAUSTED"):
            raise
        return {"refused": str(refusal).splitlines()[0]}
    sizes = {
        "arguments": memory.arguments,
        "outputs": memory.outputs - memory.aliased,
        "temporaries": memory.temporaries,
    }
    rounded = {name: round(size / _GIB, 2) for name, size in sizes.items()}
    return {**rounded, "total": memory.total / _GIB, "cpu_seconds": round(time.process_time() - start)}


def main() -> None:
    """Compile every row, print the table and the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name has this in it, such as 'v6e' or 'HCA'")
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    config = Config.from_file(CONFIGS / MODELS["Flash"])
    table = Table("layer", "slice", "arguments", "outputs", "temporaries", "used", "compile", box=None)
    for (where, mesh), (kind, layer), (form, how) in itertools.product(
        _SLICES.items(), _LAYERS.items(), _FORMS.items()
    ):
        name, chip = f"{kind}, {form}", Slice.parse(where)
        if options.only not in f"{name}, {where}":
            continue
        job = Job(layer=layer, where=where, mesh=mesh, prompts=chip.count, tokens=options.tokens, **how)
        found = _memory(config, job)
        print(json.dumps({"layer": name, "slice": where, **found}), flush=True)
        if "refused" in found:
            table.add_row(name, where, "", "", "", "does not fit", "")
            continue
        used = found["total"] * _GIB / chip.chip.hbm
        sizes = [f"{found[size]:.2f}" for size in ("arguments", "outputs", "temporaries")]
        table.add_row(name, where, *sizes, f"{used:.0%}", f"{found['cpu_seconds']} s of CPU")
    Console(width=_WIDTH).print(table)


if __name__ == "__main__":
    main()
