"""Release numerics against DeepSeek's own inference code: random small models in every form, both modes.

Needs a copy of the published ``inference`` folder; without one, the tests' stand-in of the same interface is used.
Prints what differs: operation by operation (isolated) the largest error in rms, relative to the tap, and in
both modes the largest errors in noise floors.

Run: python -m benchmarks.release [--release-code ./DeepSeek-V4-Flash/inference] [--cases 12] [--first 0] [--jobs 2]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dsv4_convert.golden.noise import MODES, Mode
from dsv4_convert.golden.recorder import record
from dsv4_convert.golden.synthetic import Form, tiny_config, write_checkpoint
from dsv4_convert.parity.explain import verdict
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.run import compare_model
from dsv4_convert.published import PublishedWeights

_STAND_IN = Path(__file__).parents[1] / "tests" / "golden" / "release_code"
_FORMS: tuple[Form, ...] = ("fp4", "fp8", "bf16")
_LENGTHS = (5, 129, 200)


def architecture(case: int) -> dict[str, Any]:
    """The raw config of a small model whose widths the release's groups divide; window-only, CSA and HCA layers."""
    rng = np.random.default_rng(case)

    def one_of(*choices: int) -> int:
        return int(rng.choice(choices))

    return tiny_config(
        hidden_size=one_of(128, 256),
        moe_intermediate_size=one_of(128, 256),
        num_attention_heads=one_of(2, 4),
        head_dim=one_of(128, 192),
        qk_rope_head_dim=64,
        q_lora_rank=128,
        o_lora_rank=64,
        num_hash_layers=one_of(0, 1, 2),
        sliding_window=one_of(16, 32, 128),
        index_head_dim=one_of(64, 128),
        index_n_heads=one_of(8, 12),
        index_topk=one_of(5, 16),
    )


def one(case: int, code: Path) -> dict[str, Any]:
    """Record and compare one case."""
    raw, form, length = architecture(case), _FORMS[case % 3], _LENGTHS[case // 3 % 3]
    tokens = np.random.default_rng(case).integers(0, raw["vocab_size"], (1 + case % 2, length))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "hf"
        write_checkpoint(source, raw, seed=case, form=form)
        golden = record(source, Path(folder) / "golden", tokens=tokens, release_code=code)
        report = compare_model(PublishedWeights.open(source), golden, modes=MODES)
    largest = {
        mode: {
            measure: max(
                getattr(tap.distance.noise, measure) for tap in report.taps if tap.mode is mode and tap.distance
            )
            for measure in ("tap", "row", "element")
        }
        for mode in MODES
    }
    isolated = [tap for tap in report.taps if tap.mode is Mode.ISOLATED and tap.distance is not None]
    return {
        "case": case,
        "form": form,
        "tokens": list(tokens.shape),
        "passed": report.passed,
        "sentence": verdict(report),
        "taps": len(report.taps) - report.count(Verdict.EMPTY),
        "ties": report.count(Verdict.TIE),
        "rms": max(tap.distance.relative_rms for tap in isolated if tap.distance),
        **{mode.value: values for mode, values in largest.items()},
    }


def main() -> None:
    """Run the cases in processes of their own; print a table, and the totals as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release-code", type=Path, default=_STAND_IN)
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    console = Console()
    table = Table(title=f"{options.release_code}: errors in noise floors", title_justify="left", box=None)
    for name in (
        "case",
        "form",
        "tokens",
        "taps",
        "ties",
        "isolated: rms",
        "tap",
        "row",
        "elem.",
        "cum.: tap",
        "row",
        "elem.",
    ):
        table.add_column(name, justify="right")
    rows = []
    cases = range(options.first, options.first + options.cases)
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=4) as pool:
        for row in pool.imap(partial(one, code=options.release_code), cases):
            rows.append(row)
            multiples = [f"{row[mode.value][name]:.1f}" for mode in MODES for name in ("tap", "row", "element")]
            shown = [str(row[name]) for name in ("case", "form", "tokens", "taps", "ties")]
            table.add_row(*shown, f"{row['rms']:.1e}", *multiples, style=None if row["passed"] else "red")
            if not row["passed"]:
                console.print(f"case {row['case']}: {row['sentence']}", style="red")
    console.print(table)
    failures = sum(not row["passed"] for row in rows)
    print(json.dumps({"cases": len(rows), "taps": sum(row["taps"] for row in rows), "failures": failures}))


if __name__ == "__main__":
    main()
