"""Shared by benchmarks of whole commands: time and peak memory of a process, cold files, the size of a folder."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

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
