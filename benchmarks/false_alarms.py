"""Does parity cry wolf? Random healthy models in float32 and bfloat16, isolated and cumulative: a failure is a bug.

Each is compared with its golden, and with the compact golden that keeps its last token exactly.

Prints the number of failures, how often choices were tied, how many noise floors healthy errors amount to, and what
share they have in common of what is allowed. The limits in ``parity/tolerances.py`` are derived from them.

Run: python -m benchmarks.false_alarms [--cases 200] [--first 0] [--jobs 2] [--dtype bfloat16] [--rows FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dsv4_convert.golden.compact import Compact
from dsv4_convert.golden.noise import MODES
from dsv4_convert.golden.shrink import shrink
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.words import verdict
from dsv4_convert.parity.run import ParityOptions, ParityRun
from dsv4_convert.parity.tolerances import LIMITS, UNIT
from tests.parity.healthy import healthy

#: A process compiles anew for every architecture, and never frees what it compiled.
_CASES_PER_PROCESS = 12
_QUANTILES = (50, 99, 99.9, 100)


def one(case: int, dtypes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Everything that is counted of one case, a row for each dtype and golden."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        made = healthy(case, Path(folder), noise=dtypes)
        compact = shrink(made.golden, Path(folder) / "compact", Compact.of([-1], made.length))
        for dtype, golden in product(dtypes, (made.golden, compact)):
            modes = MODES if golden.compact is None else None
            report = ParityRun(made.weights, golden, ParityOptions(modes=modes, dtype=dtype)).run()
            distances = [tap.distance for tap in report.taps if tap.distance is not None]
            flips = [tap.flips for tap in report.taps if tap.flips is not None]
            rows.append(
                {
                    "case": case,
                    "what": dtype if golden.compact is None else f"{dtype}, compact",
                    "passed": report.passed,
                    "sentence": verdict(report),
                    "taps": len(report.taps),
                    "empty": report.count(Verdict.EMPTY),
                    "choices": sum(flip.of for flip in flips),
                    "ties": sum(flip.ties for flip in flips),
                    "flips": sum(flip.tokens for flip in flips),
                    "tie": [flip.noise for flip in flips if flip.tokens],
                    "tap": [distance.noise.tap for distance in distances],
                    "row": [distance.noise.row for distance in distances],
                    "element": [distance.noise.element for distance in distances],
                    "systematic": [tap.systematic.share for tap in report.taps if tap.systematic is not None],
                    "allclose": [max(distance.allclose for distance in distances)],
                }
            )
    return rows


def main() -> None:
    """Run the cases in processes of their own, print the tables and the counts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--dtype", choices=tuple(UNIT), help="one of the two dtypes; both if not given")
    parser.add_argument(
        "--rows", type=Path, help="keep what is counted here as JSON lines; cases that it has are not run"
    )
    options = parser.parse_args()
    dtypes = (options.dtype,) if options.dtype else tuple(UNIT)
    console = Console()
    cases = range(options.first, options.first + options.cases)
    kept = options.rows.read_text(encoding="utf-8").splitlines() if options.rows and options.rows.exists() else []
    rows: list[dict[str, Any]] = [row for row in map(json.loads, kept) if row["case"] in cases]
    todo = sorted(set(cases) - {row["case"] for row in rows})
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=_CASES_PER_PROCESS) as pool:
        for done, found in enumerate(pool.imap_unordered(partial(one, dtypes=dtypes), todo), start=1):
            rows += found
            if options.rows:
                with options.rows.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row) + "\n" for row in found)
            for row in found:
                if not row["passed"]:
                    console.print(f"case {row['case']}, {row['what']}: {row['sentence']}", style="red")
            print(f"{done} of {len(todo)}", end="\r", flush=True)
    failures = sum(not row["passed"] for row in rows)
    console.print(_counts(rows))
    console.print(_multiples(rows))
    print(json.dumps({"cases": len(cases), "runs": len(rows), "false_alarms": failures}))


def _counts(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="healthy models, isolated and cumulative", title_justify="left", box=None)
    for name in ("golden", "models", "failures", "taps", "empty", "choices", "flips", "of them ties", "allclose at"):
        table.add_column(name, justify="right")
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [row for row in rows if row["what"] == what]
        table.add_row(
            what,
            str(len(mine)),
            str(sum(not row["passed"] for row in mine)),
            *(f"{sum(row[key] for row in mine):,}" for key in ("taps", "empty", "choices", "flips", "ties")),
            f"{max(max(row['allclose']) for row in mine):.1e}",
        )
    return table


def _multiples(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="healthy errors in multiples of the noise floor", title_justify="left", box=None)
    for name in ("golden", "measure", "median", "99%", "99.9%", "largest", "limit"):
        table.add_column(name, justify="right")
    for what in dict.fromkeys(row["what"] for row in rows):
        for measure in ("tap", "row", "element", "tie", "systematic"):
            values = [value for row in rows if row["what"] == what for value in row[measure]] or [0.0]
            quantiles = (f"{value:.2f}" for value in np.percentile(values, _QUANTILES))
            table.add_row(what, measure, *quantiles, f"{getattr(LIMITS[what.split(',')[0]], measure, 1):g}")
    return table


if __name__ == "__main__":
    main()
