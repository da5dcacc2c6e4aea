"""Disk and address space, asked before work begins."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from dsv4_convert.errors import ResourceError

#: Address space in bytes, measured with two cores: conversion needs 1.8 GB, computing 2.1 GB, of a model of 0.3 MB.
TO_CONVERT = 2 << 30
TO_COMPUTE = 3 << 30
#: For every further core: stack and arena of its threads.
_PER_CORE = 128 << 20


def nearest_folder(path: Path) -> Path:
    """``path``, or the nearest above it that exists."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def free_bytes(path: Path) -> int:
    """Bytes that are free where ``path`` lies or would lie."""
    return shutil.disk_usage(nearest_folder(path)).free


def require_address_space(needed: int) -> None:
    """Refuse where the limit on address space (``ulimit -v``) is below ``needed`` bytes and a share for every core.

    Memory itself is another matter: see ``--max-memory``, and what :mod:`.restore` asks for.

    Raises:
        ResourceError: the limit is smaller. XLA would end the process without a word, or wait for a thread for ever.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    needed += _PER_CORE * max(0, (os.cpu_count() or 1) - 2)
    if limit not in (resource.RLIM_INFINITY, -1) and limit < needed:
        raise ResourceError(
            f"the limit on address space is {limit:,} bytes, and JAX needs {needed:,} with its threads, which is not "
            "memory; raise it (ulimit -v unlimited), and limit memory by a control group"
        )
