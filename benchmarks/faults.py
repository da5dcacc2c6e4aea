"""Does parity find what people get wrong? Every fault of the catalogue, planted in a small model, one table.

For each fault, the table shows four things. Does isolated parity fail? Does it name the faulty layer and operation (the
first tap that diverges, and the first operation that is wrong on the golden's own inputs), and no other layer? Which
measures fail? How many noise floors is the error? With ``--compact`` the golden is a compact one that keeps one
token exactly, and the model runs from the tokens. With ``--dtype bfloat16``, where rounding is as large as many a
fault, every matrix is scaled a little as well. Needs the ``reference`` extra.

Run: python -m benchmarks.faults [--compact] [--dtype bfloat16] [NAME ...]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dsv4_convert.parity.report.data import ParityReport
from dsv4_convert.parity.report.words import verdict
from dsv4_convert.parity.run import ParityOptions, ParityRun
from dsv4_convert.parity.tolerances import UNIT
from tests.parity.faults.catalogue import CATALOGUE
from tests.parity.faults.fault import MODELS, examine, patient
from tests.parity.faults.scales import SCALES


def _multiple(report: ParityReport) -> str:
    first = report.first_diverging
    if first is None or first.distance is None:
        return "" if first is None or first.flips is None else f"{first.flips.tokens}/{first.flips.of} flips"
    return f"{first.distance.noise.row:.1e}"


def main() -> None:
    """Plant every fault, print the table and the counts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names; all faults if none is given")
    parser.add_argument("--compact", action="store_true", help="compare with a compact golden, from the tokens")
    parser.add_argument("--dtype", choices=tuple(UNIT), default="float32", help="dtype of weights and activations")
    options = parser.parse_args()
    everything = CATALOGUE | (SCALES if options.dtype == "bfloat16" else {})
    chosen = [
        fault for name, fault in everything.items() if not options.names or any(part in name for part in options.names)
    ]
    found = rightly = 0
    kinds: Counter[str] = Counter()
    table = Table(box=None)
    for column in ("fault", "in", "operation", "found", "named", "by", "noise floors"):
        table.add_column(column, overflow="fold")
    with tempfile.TemporaryDirectory() as folder:
        patients = {}
        for name in MODELS:
            (Path(folder) / name).mkdir()
            patients[name] = patient(Path(folder) / name, name, noise=[options.dtype])
            if options.compact:
                patients[name] = patients[name].compacted()
            healthy = ParityRun(patients[name].held, patients[name].golden, ParityOptions(dtype=options.dtype)).run()
            assert healthy.passed, verdict(healthy)
        for done, fault in enumerate(chosen, start=1):
            report = examine(patients[fault.model], fault, dtype=options.dtype)
            right = fault.named_by(report)
            found, rightly = found + (not report.passed), rightly + right
            kinds[fault.kind] += 1
            first = report.first_diverging
            table.add_row(
                fault.name,
                fault.kind,
                fault.full_tap,
                "no" if report.passed else "yes",
                "yes" if right else f"no: {first.name if first is not None else 'nothing'}",
                "" if first is None else ", ".join(first.exceeded(report.limits)),
                _multiple(report),
            )
            print(f"{done} of {len(chosen)}", end="\r", flush=True)
    Console(width=160).print(table)
    print(json.dumps({"faults": len(chosen), "kinds": kinds, "found": found, "named_rightly": rightly}))


if __name__ == "__main__":
    main()
