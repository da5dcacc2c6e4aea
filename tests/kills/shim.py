"""The preloaded shim (shim.c): how it is built, and how a process that runs under it chooses its fault."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from enum import IntEnum
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")


class Action(IntEnum):
    """The action at the chosen event; shim.c has the same values."""

    NOTHING = 0
    #: SIGKILL before the call.
    KILL = 1
    #: SIGKILL after the call; of a write after half of it.
    TORN = 2
    #: The call fails with an error of the system, once.
    FAIL = 3
    #: It and every event after it, as on a disk that stays full.
    FAIL_FROM = 4
    #: The process gets a signal, and the call goes on.
    SIGNAL = 5
    #: A write writes half.
    SHORT = 6


class Scope(IntEnum):
    """The calls that count as events; shim.c has the same values."""

    #: Calls that change a file or a folder.
    CHANGES = 0
    #: These and opening a file for reading.
    READS = 1
    #: Locks and links.
    LOCKS = 2


def compiler() -> str | None:
    """A C compiler, where there is one and the system is Linux, whose /proc the shim reads."""
    if not Path("/proc/self/fd").exists():
        return None
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def build(folder: Path) -> Path:
    """Compile the shim into ``folder``."""
    library, cc = folder / "shim.so", compiler()
    assert cc is not None
    command = [cc, "-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(SOURCE), "-ldl", "-lpthread"]
    subprocess.run(command, check=True, capture_output=True)
    return library


class Shim:
    """The shim of this process, which was started under it."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._library.faults_seen.restype = ctypes.c_long
        self._library.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, *[ctypes.c_int] * 4]

    def arm(self, root: str, *, at: int, action: int, value: int, scope: int, log: int) -> None:
        """Count events below ``root`` from here on; at number ``at`` (from 1; 0 for none) ``action`` happens."""
        self._library.faults_arm(os.fsencode(root), at, action, value, scope, log)

    def disarm(self) -> int:
        """No events from here on; the number of those that were."""
        self._library.faults_disarm()
        return int(self._library.faults_seen())
