"""Whether anything bad gets through: bad inputs, commands killed and failed at their calls, damaged files.

Each part prints its table and its failures. All of it takes half an hour of an ordinary machine, --quick a few minutes.

Run: python -m benchmarks.hostile [--quick], or one part: python -m benchmarks.hostile inputs|kills|damage [--help]
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys

from rich.console import Console
from rich.table import Table

#: Module of a part -> its name for a user.
PARTS = {"inputs": "bad inputs", "kills": "kills and faults", "damage": "damaged files"}


def run(part: str, *options: str) -> dict[str, int]:
    """Run a part in a process of its own, as one measures the memory of its children, to which a parent's counts.

    Passes on what it prints, and gives the counts that it ends with.
    """
    last = ""
    command = [sys.executable, "-u", "-m", "benchmarks.hostile", part, *options]
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
    """Run every part and print its counts, or one part with its own options; exit 1 if anything failed."""
    if sys.argv[1:2] and sys.argv[1] in PARTS:
        importlib.import_module(f"benchmarks.hostile.{sys.argv[1]}").main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a sample of each")
    sample = ["--quick"] if parser.parse_args().quick else []
    table = Table("part", "what", "count", box=None)
    failures = 0
    for part, name in PARTS.items():
        counts = run(part, *sample)
        failures += counts["failures"]
        for at, (what, count) in enumerate(counts.items()):
            table.add_row("" if at else name, what.replace("_", " "), f"{count:,}")
    table.add_row("all", "failures", f"{failures:,}")
    Console().print(table)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
