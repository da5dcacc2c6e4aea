"""The folder beside a destination in which it grows: whatever writes one, one writer at a time, and nobody else's work.

Conversions, exports, recordings and random checkpoints all use the same name, and none of them can go on with what
another one began, nor may delete it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dsv4_convert.errors import ResourceError, UsageError, listed
from dsv4_convert.locks import lock

#: Added to the name of a destination.
SUFFIX = ".dsv4-partial"
#: The file in which a writer may leave its process id.
LOCK_NAME = "lock"


def folder_of(destination: Path) -> Path:
    """The folder that belongs to ``destination``, whether it exists or not; absolute, as ``.`` has no name."""
    path = Path(os.path.abspath(destination))
    return path.parent / (path.name + SUFFIX)


def destination_of(folder: Path) -> Path:
    """The destination that :func:`folder_of` gives ``folder`` for."""
    path = Path(os.path.abspath(folder))
    return path.parent / path.name.removesuffix(SUFFIX)


@contextmanager
def held(folder: Path, own: re.Pattern[str], *, locks_a_file: bool = False) -> Iterator[None]:
    """Create ``folder`` if needed and hold a lock on it; the system releases it if the process dies.

    Args:
        folder: see :func:`folder_of`.
        own: the names that the caller writes in it; of files that are being written also ``.NAME.tmp``.
        locks_a_file: the caller also locks a file in it, so that a file system which locks nothing but files will do,
            as NFS does. Who has no such file cannot write there.

    Raises:
        UsageError: something else is in it, which the caller would delete.
        ResourceError: another process holds it, or the folder cannot be made or locked.
    """
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(folder, error) from error
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # its holder finished just now
            continue
        except OSError as error:
            raise _cannot_write(folder, error) from error
        try:
            if not _lock(descriptor, folder, optional=locks_a_file):
                raise busy(folder)
            if not is_open(descriptor, folder):
                continue
            _refuse_others(folder, own)
            yield
            return
        finally:
            os.close(descriptor)


def busy(folder: Path) -> ResourceError:
    """The error for a folder that another process holds."""
    holder = ""
    with suppress(OSError):
        descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        finally:
            os.close(descriptor)
    return ResourceError(
        f"{destination_of(folder)}: another process{f' (pid {holder})' if holder else ''} "
        f"is writing it and holds {folder}. Wait for it, or end it and run the same command again."
    )


def is_open(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still is what was opened; not so if its holder finished and removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, folder: Path, *, optional: bool) -> bool:
    try:
        return lock(descriptor, folder)
    except ResourceError:
        if not optional:
            raise
        return True


def _refuse_others(folder: Path, own: re.Pattern[str]) -> None:
    names = sorted(entry.name for entry in folder.iterdir())
    if others := [name for name in names if not own.fullmatch(re.sub(r"^\.(.+)\.tmp$", r"\1", name))]:
        raise UsageError(
            f"{folder}: what this command did not write is here, perhaps the unfinished work of another one:\n"
            f"{listed(others, limit=5)}\n"
            "Choose another destination, finish it with the command that began it, or remove the folder."
        )


def _cannot_write(folder: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"{folder}: cannot write: {error.strerror or error}. What was finished is kept; make room (or fix the cause) "
        "and run the same command again."
    )
