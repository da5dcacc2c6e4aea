"""The collectives of a compiled program, read from its text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

#: Operations that move data between devices.
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\([^{]*\) -> [^{]*)?\{")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=(%?[\w.\-]+)|\bbranch_computations=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+)")
_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"ROOT .* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT")
_SHAPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All operations of one kind: how often they run, and the bytes that one device receives."""

    kind: str
    times: int
    bytes: int


def collectives(text: str) -> tuple[Collective, ...]:
    """The collectives of one run of a compiled program; collectives in loops count once per iteration.

    A loop that does not count up to a constant counts once.
    """
    bodies = dict(_bodies(text))
    runs = _runs(bodies, _entry(text))
    times: dict[str, int] = {}
    moved: dict[str, int] = {}
    for name, lines in bodies.items():
        for line in lines:
            if (found := _COLLECTIVE.search(line)) and runs.get(name):
                kind = found[2]
                times[kind] = times.get(kind, 0) + runs[name]
                moved[kind] = moved.get(kind, 0) + runs[name] * _given(found[1])
    return tuple(Collective(kind, times[kind], moved[kind]) for kind in COLLECTIVES if kind in times)


def _bodies(text: str) -> Iterator[tuple[str, list[str]]]:
    """Name and instructions of every computation."""
    name, lines = None, list[str]()
    for line in text.splitlines():
        if name is None:
            if match := _COMPUTATION.match(line):
                name, lines = match[1], []
        elif line.startswith("}"):
            yield name, lines
            name = None
        else:
            lines.append(line)


def _entry(text: str) -> str:
    match = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    return match[1] if match else ""


def _runs(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs."""
    runs = dict.fromkeys(bodies, 0)

    def count(name: str, times: int) -> None:
        runs[name] += times
        for line in bodies[name]:
            loop, known = _LOOP.search(line), _KNOWN.search(line)
            # CPU and GPU compilers write the trip count down; for a TPU it follows from the condition.
            trips = int(known[1]) if known else _trips(bodies.get(loop[1], [])) if loop else 1
            for called in _CALLED.finditer(line):
                for inner in (called[1] or called[2]).split(", "):
                    if inner.lstrip("%") in bodies:
                        count(inner.lstrip("%"), times * trips)

    if entry in bodies:
        count(entry, 1)
    return runs


def _trips(condition: list[str]) -> int:
    """How often a loop runs whose counter starts at 0 and stays below a constant."""
    constants = {match[1]: match[2] for line in condition if (match := _CONSTANT.search(line))}
    ends = [match[1] for line in condition if (match := _BELOW.search(line))]
    return int(constants.get(ends[0], 1)) if ends else 1


def _given(shapes: str) -> int:
    """Bytes of a result. An operation that only starts returns its operands too: then the largest part counts."""
    sizes = [_bytes(dtype, dims) for dtype, dims in _SHAPE.findall(shapes)]
    return max(sizes, default=0) if shapes.startswith("(") else sum(sizes)


def _bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(match[0]) if (match := re.search(r"\d+", dtype)) else 0
    return math.prod(map(int, filter(None, dims.split(",")))) * bits // 8
