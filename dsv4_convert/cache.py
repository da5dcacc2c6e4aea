"""The folder of what dsv4 computes once and keeps for the next run: XLA's compiled programs."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

#: Value of DSV4_CACHE that turns the cache off.
OFF = "off"


def cache_folder() -> Path | None:
    """``$DSV4_CACHE``, or ``dsv4`` in the user's folder for caches; None where it is ``off``."""
    chosen = os.environ.get("DSV4_CACHE")
    if chosen:
        return None if chosen == OFF else Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv4"


def program_folder() -> Path | None:
    """The folder of compiled programs for processors like this one, which a home on many machines keeps apart."""
    folder = cache_folder()
    return None if folder is None else folder / f"xla-{platform.machine()}-{_instructions()}"


def _instructions() -> str:
    """A digest of the processor's instruction set, or of its name where the system does not list it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        told = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        told = platform.processor()
    return hashlib.sha256(told.encode()).hexdigest()[:8]
