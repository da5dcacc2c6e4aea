"""Do the limits hold for float32 products that a TPU makes of bfloat16 parts? Simulated on a CPU, one table.

The healthy model of the faults of the compiled layer runs in both programs at each precision; the table has the largest
errors of its taps, in noise floors, by measure. Needs the ``reference`` extra.

Run: python -m benchmarks.tpu_products
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.data import ParityReport
from dsv4_convert.parity.run import ParityRun
from dsv4_convert.parity.tolerances import LIMITS
from tests.parity.faults.program import examine, subject
from tests.parity.tpu_products import PASSES, tpu_products


def _largest(report: ParityReport, measure: str) -> float:
    return max(getattr(tap.distance.noise, measure) for tap in report.taps if tap.distance is not None)


def main() -> None:
    """Run both programs at every precision, print the table."""
    table = Table(box=None)
    for column in ("precision", "passes", "program", "tap", "row", "element", "taps that fail"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as folder:
        model = subject(Path(folder))
        for precision, passes in PASSES.items():
            with tpu_products(precision):
                reports = {
                    "streamed": ParityRun(model.weights, model.golden).run(),
                    "model, grouped": examine(model, "grouped"),
                }
            for program, report in reports.items():
                numbers = [f"{_largest(report, measure):.1f}" for measure in ("tap", "row", "element")]
                failing = f"{report.count(Verdict.FAIL)} of {len(report.taps)}"
                table.add_row(precision, str(len(passes)), program, *numbers, failing)
    limits = LIMITS["float32"]
    table.add_row("limits", "", "", f"{limits.tap:g}", f"{limits.row:g}", f"{limits.element:g}", "")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
