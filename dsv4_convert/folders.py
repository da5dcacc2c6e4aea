"""Which of dsv4's inputs a folder is, told by a file that only this kind has, for errors where another is expected."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypeAlias

#: A path as callers give it.
PathLike: TypeAlias = str | os.PathLike[str]

#: Files that a conversion, a golden and a published checkpoint have. A conversion also keeps the last of them.
CONVERTED_FILE, GOLDEN_FILE, CONFIG_FILE = "dsv4_manifest.json", "manifest.json", "config.json"
#: Files that Orbax writes into every checkpoint.
ORBAX_FILES = ("_CHECKPOINT_METADATA", "_METADATA", "commit_success.txt")

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")


def is_repository(text: str) -> bool:
    """Whether this may be the name of a Hub repository: ``owner/name``."""
    return _REPOSITORY.fullmatch(text) is not None


def is_converted(path: Path) -> bool:
    """Whether a checkpoint that dsv4 converted lies there."""
    return (path / CONVERTED_FILE).is_file()


def is_published(path: Path) -> bool:
    """Whether a published checkpoint lies there, and none that Orbax wrote."""
    return (path / CONFIG_FILE).exists() and not any((path / name).exists() for name in ORBAX_FILES)


def is_golden(path: Path) -> bool:
    """Whether a golden lies there."""
    return (path / GOLDEN_FILE).is_file() and not is_converted(path)


def no_golden(given: str) -> str:
    """That no golden is at ``given``, and how to get one."""
    return (
        f"{given}: no {GOLDEN_FILE} there: no golden. Record one with `dsv4 golden record SOURCE --out {given} "
        "--random 300`, or give the folder or URL of one that was recorded"
    )


def not_converted(path: Path, given: str) -> str:
    """What is at ``path`` instead of a converted checkpoint, and the way out. ``given`` is how it was asked for."""
    published = (
        f"convert it with `dsv4 convert hf-to-orbax {given} DEST`, or compare it as it is with `dsv4 parity --source "
        f"{given}`"
    )
    if is_golden(path):
        return f"a golden, not a checkpoint; `dsv4 parity CHECKPOINT --golden {given}` compares a checkpoint with it"
    if is_published(path):
        return f"a published checkpoint, which is not converted yet: {published}"
    if path.exists():
        return f"not a checkpoint written by dsv4: no {CONVERTED_FILE} in it"
    if is_repository(given):
        return f"no such folder. If it is a repository of the Hub, it is a published checkpoint: {published}"
    return "no such folder"
