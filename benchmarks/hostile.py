"""Whether anything bad gets through: inputs tried, processes killed, faults injected, damaged files read; and failures.

Each part runs by itself, too: benchmarks.bad_inputs, benchmarks.kills, benchmarks.fuzz. All of it takes half an
hour of an ordinary machine, ``--quick`` a few minutes.

Run: python -m benchmarks.hostile [--quick]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from rich.console import Console
from rich.table import Table

from benchmarks.fuzz import QUICK

#: The benchmark of each part, and the arguments that make it run a sample.
PARTS = {
    "bad inputs": ("benchmarks.bad_inputs", ["--quick"]),
    "kills and faults": ("benchmarks.kills", ["--quick"]),
    "damaged files": ("benchmarks.fuzz", ["--executions", str(QUICK)]),
}


def run(module: str, *options: str) -> dict[str, int]:
    """A benchmark in a process of its own, as one measures the memory of its children, to which a parent's counts.

    Passes on what it prints, and gives the counts that it ends with.
    """
    last = ""
    command = [sys.executable, "-u", "-m", module, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", errors="replace") as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line
    try:
        counts: dict[str, int] = json.loads(last)
    except ValueError:
        counts = {"failures": 1}  # it did not come to its end
    return counts


def main() -> None:
    """Run every part and print its counts; exit 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a sample of each")
    options = parser.parse_args()
    table = Table("part", "what", "count", box=None)
    failures = 0
    for part, (module, sample) in PARTS.items():
        counts = run(module, *(sample if options.quick else ()))
        failures += counts["failures"]
        for at, (what, count) in enumerate(counts.items()):
            table.add_row("" if at else part, what.replace("_", " "), f"{count:,}")
    table.add_row("all", "failures", f"{failures:,}")
    Console().print(table)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
