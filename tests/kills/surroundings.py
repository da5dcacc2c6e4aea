"""Other things that a machine does to a command: signals while it reads, clocks, disks that are full, small, lockless.

Each function notes its attempts and failures in a tally.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.kills.runs import Ended, Fault
from tests.kills.shim import Action, Scope
from tests.kills.subjects import CONVERSIONS, DOWNLOADS, EXPORTS, RECORDINGS, Subject, fresh
from tests.kills.sweep import Tally
from tests.kills.workshop import Workshop

_YEARS = 10 * 365 * 86_400


def readers(shop: Workshop, *, golden: bool) -> dict[str, Sequence[object]]:
    """Commands that only read, by name; with ``golden`` those that need the recorded one too."""
    inputs = shop.inputs
    commands: dict[str, Sequence[object]] = {
        "verify": ["verify", inputs / "source", "--against", inputs / "hf"],
        "compile": ["compile", "--config", inputs / "hf", "--topology", "v5p-8", "--tokens", "128"],
    }
    if golden:
        commands |= {
            "parity": ["parity", inputs / "source", "--golden", inputs / "golden"],
            "generate": ["generate", inputs / "source", "--tokens", "1,2,3", "-n", "2"],
        }
    return commands


def interrupt_readers(shop: Workshop, tally: Tally, points: int, *, golden: bool = True) -> None:
    """SIGINT and SIGTERM at files that they open, and a second SIGINT while they clean up."""
    for name, command in readers(shop, golden=golden).items():
        whole = shop.zygote.run(shop.inputs, command, Fault(scope=Scope.READS))
        if name != "compile" and whole.code:  # that needs a compiler that may not be there; it reads its config first
            tally.fail(name, whole)
            continue
        count = min(points, whole.seen)
        for number in range(count):
            at = 1 + number * whole.seen // count
            sent = (signal.SIGINT, signal.SIGTERM)[number % 2]
            fault = Fault(at, Action.SIGNAL, sent, Scope.READS)
            _check_interrupted(tally, f"{name}: {fault}", shop.zygote.run(shop.inputs, command, fault), "interrupted\n")
        twice = [(whole.seconds / 2, signal.SIGINT), (whole.seconds / 2 + 0.01, signal.SIGINT)]
        ended = shop.zygote.run(shop.inputs, command, signals=twice)
        _check_interrupted(tally, f"{name}: SIGINT twice", ended, "interrupted\n")


def interrupt_twice(shop: Workshop, tally: Tally, subject: Subject, count: int) -> None:
    """A second SIGINT right behind the first."""
    sweep = shop.sweep(subject)
    for number in range(count):
        root = fresh(shop.folder / "twice")
        after = sweep.seconds * (number + 0.5) / count
        command = subject.command(shop.inputs, root)
        ended = shop.zygote.run(root, command, signals=[(after, signal.SIGINT), (after + 0.005, signal.SIGINT)])
        _check_interrupted(tally, f"{subject.name}: SIGINT twice after {after:.2f} s", ended, "with the same command")
        again = shop.zygote.run(root, command)
        if subject.content(root) != sweep.whole:
            tally.fail(f"{subject.name}: SIGINT twice after {after:.2f} s, and then the same command again", again)


def _check_interrupted(tally: Tally, what: str, ended: Ended, said: str) -> None:
    """130 and what there is to say, or it had ended before; after a second signal the process may end by it."""
    tally.counts["signals"] += 1
    fine = ended.code in (0, 130) or (ended.code == -signal.SIGINT and "twice" in what)
    if "compile" in what:  # without its compiler it ends as it does
        fine = fine or ended.code in (2, 4)
    if not fine or (ended.code == 130 and "twice" not in what and said not in ended.err):
        tally.fail(f"{what}: exit code 130 and {said!r} expected", ended)
    if "Traceback" in ended.err or ended.left:
        tally.fail(f"{what}: a traceback, or left behind: {ended.left}", ended)


def skewed_clocks(shop: Workshop, tally: Tally, subjects: Sequence[Subject]) -> None:
    """All that an interrupted run left was changed in ten years from now."""
    for subject in subjects:
        sweep, root = shop.sweep(subject), fresh(shop.folder / "clock")
        command = subject.command(shop.inputs, root)
        shop.zygote.run(root, command, Fault(len(sweep.events) * 2 // 3, Action.KILL))
        for path in (root, *root.rglob("*")):
            os.utime(path, (time.time() + _YEARS,) * 2, follow_symlinks=False)
        again = shop.zygote.run(root, command)
        tally.counts["clocks"] += 1
        if again.code or subject.content(root) != sweep.whole:
            tally.fail(f"{subject.name}: an interrupted run of the future", again)


def without_locks(shop: Workshop, tally: Tally, subjects: Sequence[Subject]) -> None:
    """A file system that knows neither locks nor links: the work is done, or refused for that reason."""
    for subject in subjects:
        whole = shop.sweep(subject).whole
        for value in (errno.ENOTSUP, errno.ENOSYS, errno.EPERM):
            root = fresh(shop.folder / "locks")
            fault = Fault(1, Action.FAIL_FROM, value, Scope.LOCKS)
            ended = shop.zygote.run(root, subject.command(shop.inputs, root), fault)
            tally.counts["faults"] += 1
            refused = ended.code == 4 and "lock" in ended.err and "Traceback" not in ended.err
            if not (refused or (ended.code == 0 and subject.content(root) == whole)):
                tally.fail(f"{subject.name}: {errno.errorcode[value]} for every lock and link", ended)


def full_output(shop: Workshop, tally: Tally) -> None:
    """stdout is a full disk."""
    for command in (["verify", shop.inputs / "source"], ["names"], ["verify", shop.inputs / "source", "--json", "-"]):
        ended = shop.zygote.run(shop.inputs, command, Fault(stdout="/dev/full"))
        tally.counts["faults"] += 1
        if ended.code != 4 or "Traceback" in ended.err or "No space left" not in ended.err:
            tally.fail(f"{command}: into a full disk", ended)


def small_disks(shop: Workshop, tally: Tally, subjects: Sequence[Subject]) -> bool:
    """Real file systems that are full, and then read-only, where this user may mount them; whether that is so."""
    disk = shop.folder / "disk"
    disk.mkdir(exist_ok=True)
    for subject in subjects:
        whole = shop.sweep(subject).whole
        filled = False
        for pages in (8, 20, 40, 80, 160):
            with _mounted(disk, pages * os.sysconf("SC_PAGE_SIZE")) as mounted:
                if not mounted:
                    return False
                command = subject.command(shop.inputs, disk)
                ended = shop.zygote.run(disk, command)
                tally.counts["faults"] += 1
                if ended.code == 0:
                    break
                filled = True
                if ended.code != 4 or "Traceback" in ended.err:
                    tally.fail(f"{subject.name}: a disk of {pages} pages", ended)
                subprocess.run(["mount", "-o", "remount,size=64m,ro", str(disk)], check=True)
                ended = shop.zygote.run(disk, command)
                tally.counts["faults"] += 1
                if ended.code != 4 or "Traceback" in ended.err:
                    tally.fail(f"{subject.name}: a disk that became read-only", ended)
                subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
                again = shop.zygote.run(disk, command)
                if again.code or subject.content(disk) != whole:
                    tally.fail(f"{subject.name}: after room was made on a disk of {pages} pages", again)
                else:
                    tally.counts["identical"] += 1
        if not filled:
            tally.fail(f"{subject.name}: no disk was too small")
    return True


@contextmanager
def _mounted(folder: Path, size: int) -> Iterator[bool]:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "dsv4-kills", str(folder)]
    try:
        mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


#: One of each kind, for what need not be tried with all.
SAMPLE = (CONVERSIONS[0], EXPORTS[0], DOWNLOADS[0], RECORDINGS[0])
