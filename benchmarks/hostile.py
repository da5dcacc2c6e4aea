"""Whether anything bad gets through: inputs tried, processes killed, faults injected, damaged files read; and failures.

Each part runs by itself, too: benchmarks.bad_inputs, benchmarks.kills, benchmarks.fuzz. All of it takes about an hour
of an ordinary machine, ``--quick`` a few minutes.

Run: python -m benchmarks.hostile [--quick]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from benchmarks import bad_inputs, fuzz, kills

#: Each prints what failed, and gives what it counted.
PARTS: dict[str, Callable[[bool], dict[str, int]]] = {
    "bad inputs": bad_inputs.run,
    "kills and faults": kills.run,
    "damaged files": fuzz.run,
}


def main() -> None:
    """Run every part and print its counts; exit 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a sample of each")
    options = parser.parse_args()
    table = Table("part", "what", "count", box=None)
    failures = 0
    for part, run in PARTS.items():
        counts = run(options.quick)
        failures += counts["failures"]
        for at, (what, count) in enumerate(counts.items()):
            table.add_row("" if at else part, what, f"{count:,}")
    table.add_row("all", "failures", f"{failures:,}")
    Console().print(table)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
