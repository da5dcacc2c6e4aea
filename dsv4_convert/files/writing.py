"""Writing a file whole or not at all, and durably; the one error for a write that fails."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dsv4_convert.errors import ResourceError

#: Errors of a place that takes nothing, where there was no work to lose.
_OF_THE_PLACE = frozenset(
    {errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EPERM, errno.EROFS}
)


@contextmanager
def writing(what: object, *, nbytes: int | None = None) -> Iterator[None]:
    """Turn an operating-system error of the block into a :class:`ResourceError` that says how to go on.

    Args:
        what: path of what is written, or words that end with it.
        nbytes: how many bytes are written, where that is known.
    """
    try:
        yield
    except BrokenPipeError:  # whoever read does so no more
        raise
    except OSError as error:
        needed = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and isinstance(what, Path):
            sizes = [f"{nbytes:,} bytes are needed"] if nbytes is not None else []
            with suppress(OSError):
                sizes.append(f"{shutil.disk_usage(what.parent).free:,} are free")
            needed = f" ({', '.join(sizes)})" if sizes else ""
        way_out = "Choose a place that can be written, or fix the cause"
        if error.errno not in _OF_THE_PLACE:
            way_out = "Finished work is kept; make room (or fix the cause)"
        raise ResourceError(
            f"{what}: cannot write: {error.strerror or error}{needed}. {way_out} and run the same command again."
        ) from error


@contextmanager
def atomic_write(path: Path, *, nbytes: int | None = None, what: object = None) -> Iterator[BinaryIO]:
    """A stream to a neighbour of ``path`` that takes its name once everything is on disk.

    A file of that name is replaced then, and keeps its permissions. A process that is killed leaves the neighbour,
    ``.NAME.RANDOM.tmp``, which a :class:`~dsv4_convert.files.workspace.Workspace` removes.

    Args:
        path: the file.
        nbytes: how many bytes are written, where that is known.
        what: what an error says of the file; its path if None.

    Raises:
        ResourceError: the disk is full, or the folder cannot be written to.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with writing(what or path, nbytes=nbytes):
        try:
            with beside.open("xb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            with suppress(FileNotFoundError):
                beside.chmod(path.stat().st_mode & 0o777)
            beside.replace(path)
            sync(path.parent)
        except BaseException:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise


def write_atomically(path: Path, data: bytes, *, what: object = None) -> None:
    """Write a whole file by :func:`atomic_write`."""
    with atomic_write(path, nbytes=len(data), what=what) as stream:
        stream.write(data)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk, so that they survive a power loss."""
    with writing(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
