"""DeepSeek's own inference code against dsv4: random small models in every form, both modes.

Needs a copy of the published ``inference`` folder; without one, the tests' stand-in of the same interface is used.
Prints what differs: isolated (in release numerics, by operation) the largest error in rms, relative to the tap,
and in both modes the largest errors in noise floors.

Run: python -m benchmarks.release [--model v4.1] [--numerics plain] [--release-code ./DeepSeek-V4-Flash/inference]
                                  [--cases 12] [--first 0] [--jobs 2]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dsv4_convert.golden.noise import MODES, Mode
from dsv4_convert.golden.recorder import RecordingOptions, record
from dsv4_convert.golden.synthetic import Form, tiny_config, tiny_v41_config, write_checkpoint
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.words import verdict
from dsv4_convert.parity.run import ParityOptions, ParityRun
from dsv4_convert.weights.published import PublishedWeights

_STAND_INS = Path(__file__).parents[1] / "tests" / "golden"
_LENGTHS = (5, 129, 200)


def v4(case: int) -> dict[str, Any]:
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


def v41(case: int) -> dict[str, Any]:
    """The raw config of a small V4.1 with every kind of layer, whose widths the release's groups divide."""
    rng = np.random.default_rng(case)

    def one_of(*choices: int) -> int:
        return int(rng.choice(choices))

    return tiny_v41_config(
        hidden_size=one_of(64, 128),
        moe_intermediate_size=one_of(32, 64),
        num_attention_heads=one_of(2, 4),
        head_dim=one_of(32, 64),
        q_lora_rank=one_of(32, 64),
        sliding_window=one_of(6, 16, 32),
        index_n_heads=64,
        index_head_dim=one_of(32, 64),
        # Four candidate blocks have 13 entries at least; where more are chosen, the code takes others (docs/limits.md).
        index_topk=one_of(5, 13),
        candidate_block_size=one_of(4, 8),
    )


#: Raw configs by case, the forms in which weights are published, and the folder of the stand-in's code.
_MODELS: Mapping[str, tuple[Callable[[int], dict[str, Any]], tuple[Form, ...], str]] = {
    "v4": (v4, ("fp4", "fp8", "bf16"), "release_code"),
    "v4.1": (v41, ("fp4",), "release_code_v41"),
}


def one(case: int, model: str, numerics: str, code: Path) -> dict[str, Any]:
    """Record and compare one case."""
    architecture, forms, _ = _MODELS[model]
    raw, form, length = architecture(case), forms[case % len(forms)], _LENGTHS[case // len(forms) % 3]
    vocabulary = raw.get("text_config", raw)["vocab_size"]
    tokens = np.random.default_rng(case).integers(0, vocabulary, (1 + case % 2, length))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "hf"
        write_checkpoint(source, raw, seed=case, form=form)
        asked = RecordingOptions(tokens=tokens, release_code=code, numerics=numerics)
        golden = record(source, Path(folder) / "golden", asked)
        report = ParityRun(PublishedWeights.open(source), golden, ParityOptions(modes=MODES)).run()
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
    parser.add_argument("--model", choices=sorted(_MODELS), default="v4")
    parser.add_argument("--numerics", choices=("plain", "release"), default="release")
    parser.add_argument("--release-code", type=Path)
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    code = options.release_code or _STAND_INS / _MODELS[options.model][2]
    console = Console()
    table = Table(title=f"{code}: errors in noise floors", title_justify="left", box=None)
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
        for row in pool.imap(partial(one, model=options.model, numerics=options.numerics, code=code), cases):
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
