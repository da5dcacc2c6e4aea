"""The exceptions that a user can meet, one class per exit code of the command line.

Every message names the file or tensor, what was expected, what was found, and the way out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dsv4_convert.show.text import for_terminal
from dsv4_convert.show.urls import without_secrets

_LONGEST_LINE = 2000


class Dsv4Error(Exception):
    """Base of every error that dsv4 raises on purpose. Exit code 3 unless a subclass says otherwise.

    A message quotes names and values that somebody else wrote, so it is escaped for a terminal, and a line that is
    longer than anybody reads is cut. In a name, tabs and joiners are escaped too, since nobody would see them. The URLs
    in it lose their secrets.
    """

    exit_code = 3

    def __init__(self, message: str) -> None:
        lines = without_secrets(message).split("\n")
        super().__init__("\n".join(map(_visible, for_terminal("\n".join(map(_cut, lines))).split("\n"))))


class CheckFailed(Dsv4Error):
    """A check ran to its end and found a difference: parity, verification. Exit code 1."""

    exit_code = 1


class UsageError(Dsv4Error):
    """The request itself is wrong: an unknown tap, a layer that does not exist. Exit code 2."""

    exit_code = 2


class BadInput(Dsv4Error):
    """A file is corrupt, unsafe, incomplete or not supported. Exit code 3."""


class ResourceError(Dsv4Error):
    """Out of disk, memory or network. Exit code 4."""

    exit_code = 4


#: Exceptions of our own mistakes and of exhausted memory. They pass through where every other exception of a library
#: means that a file or a network is at fault.
BUGS = (AssertionError, AttributeError, MemoryError, NameError, TypeError)


def _cut(line: str) -> str:
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}…"


def _visible(line: str) -> str:
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


def listed(problems: Sequence[str], *, limit: int = 20) -> str:
    """One problem per line, the first ``limit`` of them, then how many were left out."""
    shown = [f"  - {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        shown.append(f"  … and {len(problems) - limit} more")
    return "\n".join(shown)


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """``; did you mean float32?`` where one of ``words`` comes close to ``word``, else nothing."""
    import difflib

    close = difflib.get_close_matches(word.lower(), list(words), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
