"""The disk on which something lies, or would lie once it is made."""

from __future__ import annotations

import shutil
from pathlib import Path


def nearest_folder(path: Path) -> Path:
    """``path``, or the nearest above it that exists."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def free_bytes(path: Path) -> int:
    """Bytes that are free where ``path`` lies or would lie."""
    return shutil.disk_usage(nearest_folder(path)).free
