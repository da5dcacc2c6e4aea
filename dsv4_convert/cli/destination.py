"""Files that a command writes: refused before the work where that can be known, and never half written."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from dsv4_convert.errors import ResourceError, UsageError


def check_destination(option: str, target: str | Path | None) -> None:
    """Refuse what :func:`write_text` could not write, before the work is done; nothing for None.

    Raises:
        UsageError: a folder, a file in a folder that is not there, or no permission.
    """
    if target is None:
        return
    path = Path(target)
    if path.is_dir():
        raise _unwritable(option, target, "it is a folder")
    if not path.parent.is_dir():
        raise _unwritable(option, target, f"there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise _unwritable(option, target, "no permission")


def write_text(option: str, target: str | Path, text: str) -> None:
    """Write a file whole or not at all: beside its place first, then renamed. Pipes and devices are written in place.

    Raises:
        ResourceError: it cannot be written.
    """
    path = Path(target)
    try:
        if path.exists() and not path.is_file():  # as it was given: a pipe behind /dev/stdout has no other path
            path.write_text(text, encoding="utf-8")
        else:
            _replace(Path(os.path.realpath(path)), text)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _refused(option, target, error) from error


def append_text(option: str, target: str | Path, text: str) -> None:
    """Write at the end of a file that others write to, too. Raises :class:`ResourceError` if it cannot be written."""
    try:
        with open(target, "a", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise _refused(option, target, error) from error


def _replace(path: Path, text: str) -> None:
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(number, "w", encoding="utf-8") as stream:
            stream.write(text)
        # mkstemp lets nobody else read; a file that is there keeps its permissions, a new one gets the usual ones.
        os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _refused(option: str, target: str | Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"{option} {target}: cannot be written ({error.strerror or error}); make room or choose another file, then run "
        "the same command again"
    )


def _unwritable(option: str, target: str | Path, why: str) -> UsageError:
    return UsageError(f"{option} {target}: cannot be written ({why})")
