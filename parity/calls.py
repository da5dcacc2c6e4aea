"""The calls of a run: the tokens that the model gets at a time, and the rows of taps that they make.

Shape letters: ``B`` prompts, ``R`` rows of a tap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsv4_convert.golden.layout import calls
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.tap import Tap
from dsv4_convert.spec.taps import TapKey, tap_named

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """``width`` tokens of each prompt, from token ``start[b]`` on; those from ``count[b]`` on are padding.

    ``cached``: the tokens before are in a cache. Otherwise the call has whole prompts. ``tokens_in_all``: of a prompt.
    """

    start: Array
    count: Array
    width: int
    cached: bool
    tokens_in_all: int

    @property
    def tokens(self) -> Array:
        """Index of each token ``[B, width]``; padding goes beyond the prompt's end."""
        return self.start[:, None] + np.arange(self.width)

    def enter(self, entering: Mapping[str, Any]) -> dict[str, Any]:
        """The part of what enters a layer (:func:`dsv4_convert.golden.layout.entering`).

        Of a past that an earlier layer compressed, the layer gets all: it does not see entries beyond the call.
        """
        return {name: value if _by_entry(tap_named(name)) else self.take(value) for name, value in entering.items()}

    def leave(self, part: Mapping[str, Any], whole: dict[str, Array]) -> None:
        """Write what left a layer in this call to all of it."""
        for name, value in part.items():
            if _by_entry(tap_named(name)):
                whole[name] = np.asarray(value)
                continue
            rows = whole.setdefault(name, np.empty((len(value), self.tokens_in_all, *value.shape[2:]), value.dtype))
            self._write(np.asarray(value), rows, 1)

    def take(self, whole: Any) -> Any:
        """The tokens' rows of an array ``[B, tokens, …]``; padding repeats the last one."""
        if not self.cached:
            return whole
        return whole[np.arange(len(self.start))[:, None], np.minimum(self.tokens, whole.shape[1] - 1)]

    def part(self, whole: Array, key: TapKey, config: Config) -> Array:
        """The rows of a tap that the call makes. Entries that it may not complete are zeros."""
        if not self.cached or _shared(key):
            return whole
        prompt, row, there = self._rows(_per_row(key, config))
        part = np.zeros((*there.shape, *whole.shape[2:]), whole.dtype)
        part[there] = whole[prompt[there], row[there]]
        return part

    def put(self, part: Array, whole: Array, key: TapKey, config: Config) -> None:
        """Write the rows of a tap that the call made to all of it."""
        if _shared(key):
            whole[...] = part
        else:
            self._write(part, whole, _per_row(key, config))

    def _write(self, part: Array, whole: Array, per_row: int) -> None:
        prompt, row, there = self._rows(per_row)
        whole[prompt[there], row[there]] = part[there]

    def _rows(self, per_row: int) -> tuple[Array, Array, Array]:
        """Prompt and row ``[B, R]`` of the rows that the call can make, and whether it makes them."""
        first = self.start // per_row
        made = (self.start + self.count) // per_row - first
        number = np.arange(-(-self.width // per_row))
        prompt = np.broadcast_to(np.arange(len(first))[:, None], (len(first), len(number)))
        return prompt, first[:, None] + number, number < made[:, None]


def calls_of(batch: int, tokens: int, decode: int, chunk: int | None = None) -> list[Call]:
    """The calls on ``batch`` prompts of ``tokens`` tokens, of which the last ``decode`` come one by one.

    The tokens before these come at once, or ``chunk`` at a time. Then the first chunk of every prompt has another
    length, so that a call has prompts of unequal lengths, with padding, and one that has ended already.
    """
    first = tokens - decode
    if chunk is None:
        parts = [(np.full(batch, start), np.full(batch, stop - start)) for start, stop in calls(tokens, decode)]
        return [Call(start, count, int(count[0]), len(parts) > 1, tokens) for start, count in parts]
    short = np.array([chunk - prompt * chunk // batch for prompt in range(batch)])
    stops = [np.minimum(short + number * chunk, first) for number in range(-(-(first - short.min()) // chunk) + 1)]
    stops += [np.full(batch, token + 1) for token in range(first, tokens)]
    starts = [np.zeros(batch, np.int64), *stops[:-1]]
    return [
        Call(start, stop - start, 1 if start.min() >= first else chunk, True, tokens)
        for start, stop in zip(starts, stops, strict=True)
    ]


def _shared(key: TapKey) -> bool:
    """Whether a tap is what an earlier layer compressed: every call has all of it."""
    return key.tap.origin is not None and _by_entry(key.tap)


def _by_entry(tap: Tap) -> bool:
    return tap.shape.split()[1] == "T"


def rows_in_all(key: TapKey, config: Config, tokens: int) -> int:
    """Rows of axis 1 that so many tokens make of a tap."""
    return tokens // _per_row(key, config)


def _per_row(key: TapKey, config: Config) -> int:
    """The tokens that a row of axis 1 stands for: 1, or those of a compressed block."""
    if key.layer is None or key.tap.shape.split()[1] == "S":
        return 1
    return config.ratio_of(key.layer)
