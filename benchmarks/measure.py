"""Shared by benchmarks: time and peak memory of a process, sides that take turns, cold files, sizes, a table."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.table import Table

DSV4 = [sys.executable, "-m", "dsv4_convert"]
#: Python keeps the bytecode of what it imports, as an installed package has it.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def measured(command: Sequence[str]) -> dict[str, object]:
    """Run a process; seconds, of processors too, peak resident memory in GiB (mapped files included), the exit code."""
    start = time.perf_counter()
    process = os.spawnve(os.P_NOWAIT, command[0], list(command), _ENVIRONMENT)
    _, status, usage = os.wait4(process, 0)
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_gib": round(usage.ru_maxrss / 2**20, 3),
        "exit_code": os.waitstatus_to_exitcode(status),
    }


def dsv4(*arguments: object) -> dict[str, object]:
    """Run one dsv4 command."""
    words = [str(argument) for argument in arguments]
    return {"command": " ".join(["dsv4", *words]), **measured([*DSV4, *words])}


def python(code: str, *arguments: object) -> dict[str, object]:
    """Run a piece of Python in a process of its own."""
    return measured([sys.executable, "-c", code, *map(str, arguments)])


def in_turns(
    sides: Mapping[str, Callable[[], object]], runs: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The seconds of each run of each side, and those of the processors. Sides that have run before are compiled."""
    elapsed: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, side in sides.items():
            start, used = time.perf_counter(), time.process_time()
            side()
            elapsed[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - used)
    return elapsed, processor


def table_of(title: str, rows: Sequence[Mapping[str, object]]) -> Table:
    """Rows with the same keys, which become the columns."""
    table = Table(title=title, box=None)
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    return table


def make_cold(folder: Path) -> None:
    """Drop the clean pages of all files of a folder from the page cache; needs no privilege."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def gigabytes(folder: Path) -> float:
    """GB of all files below a folder."""
    return round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9, 2)
