"""Numbers for people: bytes and counts."""

from __future__ import annotations

from collections.abc import Iterable

#: Ranges that are all listed.
_PARTS = 4


def size(nbytes: float) -> str:
    """Bytes for people: ``159.6 GB`` (powers of 1000, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError("unreachable")


def count(number: float) -> str:
    """A large number for people: ``284.3 B`` parameters, in the letters that models are named with."""
    for letter in ("", " K", " M", " B", " T"):
        if number < 1000 or letter == " T":
            return f"{number:.0f}" if not letter else f"{number:.{2 if letter == ' T' else 1}f}{letter}"
        number /= 1000
    raise AssertionError("unreachable")


def ranges(numbers: Iterable[int]) -> str:
    """Numbers for people, as ``--layers`` takes them too: ``0-3, 7``; ``none`` for none."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in found) or "none"


def duration(seconds: float) -> str:
    """``0:12:40``, ``12 s`` below a minute."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def clock(seconds: float) -> str:
    """As a stopwatch shows it: ``0:41``, ``1:02:07``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def few_ranges(numbers: Iterable[int]) -> str:
    """As :func:`ranges`, with the middle of many left out: ``3, 5, … 41``."""
    parts = ranges(numbers).split(", ")
    return ", ".join(parts) if len(parts) <= _PARTS else f"{parts[0]}, {parts[1]}, … {parts[-1]}"


def number_of(number: int, noun: str) -> str:
    """A count and what it counts: ``1 tap``, ``1,204 taps``; a plural other than with an s is ``entry/entries``."""
    one, _, many = noun.partition("/")
    return f"{number:,} {one if number == 1 else many or one + 's'}"
