"""Does anything half-done ever pass for whole? Commands that write, killed, failed and interrupted at their calls.

Each command runs once undisturbed, and every call that changes a file or a folder is noted. Then, one fault in a run:
SIGKILL before or in the midst of such a call, or by time; the call fails with ENOSPC, EIO, EDQUOT, EACCES or EROFS; the
disk stays broken from there on; SIGINT or SIGTERM. After each the destination must be absent, resumable or whole, a
failure must be exit code 4 with the file and the way out (130 after a signal), and the same command again must end with
the same bytes, every file and manifest. After kills everything that might take the rest for whole is asked. Then two
runs at once, signals while commands read, clocks ten years ahead, disks without locks, small and read-only ones.

Calls are met by a preloaded library (tests/kills/shim.c), those of native code too. Needs Linux, a C compiler and the
``reference`` extra.

Run: python -m benchmarks.hostile kills [--quick | --every] [NAME ...]
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tests.kills import surroundings
from tests.kills.subjects import CONVERSIONS, DOWNLOADS, EXPORTS, MAKERS, RECORDINGS, REPORTS, Subject
from tests.kills.sweep import Tally
from tests.kills.workshop import Workshop, workshop

#: Columns of the table, between the command and its failures.
COLUMNS = (
    "killed",
    "faults",
    "survived",
    "signals",
    "two at once",
    "acceptors asked",
    "half-done accepted",
    "identical",
)


def run(quick: bool = False, *, every: bool = False, names: Sequence[str] = ()) -> dict[str, int]:
    """Run the sweep and print a table per command and every failure; returns the counts, among them ``failures``.

    Args:
        quick: try a few points of each command.
        every: let every call fail; otherwise a quarter of the first command's calls, and one call of each kind.
        names: parts of the names of commands, and ``surroundings``; empty for all.
    """
    started = time.monotonic()
    tallies: list[Tally] = []
    with workshop(reference=True) as shop:
        for subject in (*CONVERSIONS, *EXPORTS, *DOWNLOADS, *MAKERS, *RECORDINGS, *REPORTS):
            if _chosen(subject.name, names):
                tallies.append(_swept(shop, subject, quick=quick, every=every))
                _say(tallies[-1], started)
        if _chosen("surroundings", names):
            tallies.append(_surroundings(shop, quick=quick))
            _say(tallies[-1], started)
    return _printed(tallies)


def _chosen(name: str, names: Sequence[str]) -> bool:
    return not names or any(part in name for part in names)


def _swept(shop: Workshop, subject: Subject, *, quick: bool, every: bool) -> Tally:
    """One command, killed, failed and interrupted. The first of the conversions and recordings most of all."""
    sweep = shop.sweep(subject)
    sites = sweep.sites()
    if quick:
        few = sites[:: max(len(sites) // 3, 1)]
        sweep.kill(few)
        sweep.fail(few)
        sweep.interrupt(few[1:2])
        return sweep.tally
    first, recording = subject in (CONVERSIONS[0], RECORDINGS[0]), subject is RECORDINGS[0]
    some = sites if first or len(sites) < 60 else sites[::2]
    sweep.kill(sweep.events if recording else some, acceptors=4)
    if recording:  # few calls, with long times between them
        sweep.kill(sweep.events, acceptors=4, turn=1)
    sweep.kill_at_times(50 if recording else 10)
    sweep.fail(sweep.events if every else sweep.spread(len(sweep.events) // 4) if first else sites[::2])
    sweep.fail(sites[::8], lasting=True)
    sweep.fail(sites[::16], errors=5)
    sweep.limit_file_size(4 << 10)
    sweep.interrupt(sites[:: 3 if first else 6])
    sweep.two_at_once(len(sweep.events) * 2 // 3)
    return sweep.tally


def _surroundings(shop: Workshop, *, quick: bool) -> Tally:
    tally = Tally("surroundings")
    sample = surroundings.SAMPLE[:1] if quick else surroundings.SAMPLE
    surroundings.without_locks(shop, tally, sample)
    surroundings.skewed_clocks(shop, tally, sample)
    surroundings.full_output(shop, tally)
    if not surroundings.small_disks(shop, tally, sample):
        print("small and read-only disks: left out, this user may not mount any")
    surroundings.interrupt_readers(shop, tally, 1 if quick else 6, golden=not quick)
    surroundings.interrupt_twice(shop, tally, CONVERSIONS[0], 2 if quick else 10)
    return tally


def _say(tally: Tally, started: float) -> None:
    print(f"{time.monotonic() - started:6.0f} s  {tally.subject}: {dict(tally.counts)}", flush=True)
    for failure in tally.failures:
        print(f"FAILURE {failure}", flush=True)


def _printed(tallies: list[Tally]) -> dict[str, int]:
    """The table, and its sums."""
    table = Table(box=None)
    for column in ("command", *COLUMNS, "failures"):
        table.add_column(column, justify="left" if column == "command" else "right")
    for tally in tallies:
        table.add_row(tally.subject, *(str(tally.counts[column]) for column in COLUMNS), str(len(tally.failures)))
    Console(width=160).print(table)
    total: Counter[str] = sum((tally.counts for tally in tallies), Counter())
    counts = {column.replace(" ", "_").replace("-", "_"): total[column] for column in (*COLUMNS, "clocks")}
    return {**counts, "failures": sum(len(tally.failures) for tally in tallies)}


def main(arguments: list[str]) -> None:
    """Print the table and the counts as JSON; exits 1 if anything failed."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.hostile kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few points of each command")
    parser.add_argument("--every", action="store_true", help="every call of every command fails once")
    parser.add_argument("names", nargs="*", help="parts of names of commands, or surroundings; all if none is given")
    options = parser.parse_args(arguments)
    counts = run(options.quick, every=options.every, names=options.names)
    print(json.dumps(counts))
    raise SystemExit(1 if counts["failures"] else 0)
