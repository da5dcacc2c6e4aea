"""Files that a command writes: refused before the work where that can be known, and never half written."""

from __future__ import annotations

import os
from pathlib import Path

from dsv4_convert.errors import UsageError
from dsv4_convert.files.writing import write_atomically, writing


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
    """Write a text as :func:`write_bytes` does. Raises likewise."""
    write_bytes(option, target, text.encode())


def write_bytes(option: str, target: str | Path, data: bytes) -> None:
    """Write a file whole or not at all, and through a link. Pipes and devices are written in place.

    Raises:
        ResourceError: it cannot be written.
    """
    path, what = Path(target), f"{option} {target}"
    with writing(what):
        if path.exists() and not path.is_file():  # as it was given: a pipe behind /dev/stdout has no other path
            path.write_bytes(data)
        else:
            write_atomically(Path(os.path.realpath(path)), data, what=what)


def append_text(option: str, target: str | Path, text: str) -> None:
    """Append to a file that others write to as well. Raises :class:`ResourceError` if it cannot be written."""
    with writing(f"{option} {target}"), open(target, "a", encoding="utf-8") as stream:
        stream.write(text)


def _unwritable(option: str, target: str | Path, why: str) -> UsageError:
    return UsageError(f"{option} {target}: cannot be written ({why})")
