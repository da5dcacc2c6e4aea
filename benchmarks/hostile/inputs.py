"""Does anything bad get through? Every input of the catalogue, through the commands that meet it, one table.

An input that has to be refused is refused rightly if every command gives its exit code and one message that names what
it has to name, prints no traceback, and leaves nothing that passes for a result. One that is odd and legal is accepted
rightly if what is made of it has the right values. Needs the ``reference`` extra.

Run: python -m benchmarks.hostile inputs [--quick] [ID ...]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bad_inputs.case import Bench, Case, examine
from tests.bad_inputs.catalogue import AREAS, IDS


def run(quick: bool, ids: tuple[str, ...] = ()) -> dict[str, int]:
    """Try every input, print a table per area and every failure; what was counted.

    ``quick`` leaves out the inputs whose commands compile programs or wait. ``ids`` are beginnings of ids; all if none.
    """
    # As the commands, not as an accelerator would do it.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    total: Counter[str] = Counter()
    failures: list[str] = []
    table = Table("area", "inputs", "commands", "refused rightly", "accepted rightly", "failures", box=None)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # some cases run without the rights of root
        bench = Bench(Path(folder))
        for area, cases in AREAS.items():
            counts: Counter[str] = Counter()
            for case in cases:
                if _left_out(case, quick, ids):
                    continue
                problems = examine(bench, case)
                counts["inputs"] += 1
                counts["commands"] += len(case.steps)
                counts["failures" if problems else "accepted" if case.accepted else "refused"] += 1
                failures += [f"{case.name}: {problem}" for problem in problems]
                print(f"{area} {counts['inputs']} of {len(cases)}", end="\r", flush=True)
            columns = ("inputs", "commands", "refused", "accepted", "failures")
            table.add_row(area, *(str(counts[column]) for column in columns))
            total.update(counts)
    Console(width=120).print(table)
    for failure in failures:
        print(failure)
    kinds = {case.id for cases in AREAS.values() for case in cases if not _left_out(case, quick, ids)}
    return {
        "kinds of bad input": len(kinds & IDS.keys()),
        "bad inputs": total["inputs"],
        "commands": total["commands"],
        "refused rightly": total["refused"],
        "accepted rightly": total["accepted"],
        "failures": total["failures"],
    }


def _left_out(case: Case, quick: bool, ids: tuple[str, ...]) -> bool:
    return (quick and case.slow) or (bool(ids) and not case.id.startswith(ids))


def main(arguments: list[str]) -> None:
    """Run, and print the counts as JSON."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.hostile inputs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ids", nargs="*", help="beginnings of ids, such as F or T17; all if none is given")
    parser.add_argument("--quick", action="store_true", help="leave out what compiles programs or waits")
    options = parser.parse_args(arguments)
    counts = run(options.quick, tuple(options.ids))
    print(json.dumps(counts))
    raise SystemExit(1 if counts["failures"] else 0)
