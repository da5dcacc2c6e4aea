"""The exceptions that a user can meet, one class per exit code of the command line.

Every message names the file or tensor, what was expected, what was found, and the way out.
"""

from __future__ import annotations

from collections.abc import Sequence


class Dsv4Error(Exception):
    """Base of every error that dsv4 raises on purpose. Exit code 3 unless a subclass says otherwise."""

    exit_code = 3


class CheckFailed(Dsv4Error):
    """A check ran to its end and found a difference: parity, verification. Exit code 1."""

    exit_code = 1


class UsageError(Dsv4Error):
    """The request itself is wrong: an unknown tap, a layer that does not exist. Exit code 2."""

    exit_code = 2


class BadInput(Dsv4Error):
    """A file is corrupt, unsafe, incomplete or not supported. Exit code 3."""


class ResourceError(Dsv4Error):
    """Disk, memory or network does not suffice. Exit code 4."""

    exit_code = 4


def listed(problems: Sequence[str], *, limit: int = 20) -> str:
    """One problem per line, the first ``limit`` of them, then how many were left out."""
    shown = [f"  - {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        shown.append(f"  … and {len(problems) - limit} more")
    return "\n".join(shown)
