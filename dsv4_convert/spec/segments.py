"""The order of layers as runs of a repeated pattern, so that layers of one kind can share a program."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from dsv4_convert.spec.config import Config

#: Longest pattern that is looked for.
_LONGEST = 4


class Segment(NamedTuple):
    """``repeats`` times the layers of a pattern, from layer ``first`` on, by their kinds (``Config.layer_kind``)."""

    first: int
    pattern: tuple[Any, ...]
    repeats: int

    def layers(self, place: int) -> range:
        """The layers at one place of the pattern."""
        start, step = self.first + place, len(self.pattern)
        return range(start, start + step * self.repeats, step)


def segments(config: Config) -> tuple[Segment, ...]:
    """The model's layers in order; as few segments as it takes, from the longest run on at every layer.

    V4-Flash: two window-only layers, one CSA layer, and 20 times an HCA and a CSA layer.
    """
    kinds = tuple(map(config.layer_kind, range(config.num_hidden_layers)))
    found: list[Segment] = []
    first = 0
    while first < len(kinds):
        best = max((_run(kinds, first, length) for length in range(1, _LONGEST + 1)), key=_covered)
        found.append(best)
        first += _covered(best)
    return tuple(found)


def paths_of(config: Config, key: tuple[Any, ...]) -> tuple[str, ...]:
    """The parameter that a key of a model, ``("layers", 3, "attn", "wq_a")``, stands for, or those that it stacks."""
    if key[:2] != ("layers", "segments"):
        return (".".join(map(str, key)),)
    segment, place, *rest = key[2:]
    return tuple(".".join(map(str, ("layers", layer, *rest))) for layer in segments(config)[segment].layers(place))


def _run(kinds: tuple[Hashable, ...], first: int, length: int) -> Segment:
    """The run of the pattern of ``length`` layers at ``first``; that layer alone if the pattern does not repeat."""
    pattern = kinds[first : first + length]
    repeats = 1
    while kinds[first + repeats * length : first + (repeats + 1) * length] == pattern:
        repeats += 1
    return Segment(first, pattern, repeats) if repeats > 1 else Segment(first, kinds[first : first + 1], 1)


def _covered(segment: Segment) -> int:
    return len(segment.pattern) * segment.repeats
