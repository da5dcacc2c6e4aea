"""The calls of a run: the tokens that the model gets at a time, and the rows of taps that they make.

Shape letters: ``B`` prompts, ``R`` rows of a tap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsv4_convert.golden.layout import calls, is_drafted, known_tokens, of_entries, tokens_of_row
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.taps import TapKey

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """``width`` tokens of each prompt, from token ``start[b]`` on; those from ``count[b]`` on are padding.

    ``cached``: the tokens before are in a cache. Otherwise the call has whole prompts.
    """

    start: Array
    count: Array
    width: int
    cached: bool

    @property
    def tokens(self) -> Array:
        """Index of each token ``[B, width]``; padding goes beyond the prompt's end."""
        return self.start[:, None] + np.arange(self.width)

    def enter(self, entering: Mapping[str, Any], layer: int, config: Config) -> dict[str, Any]:
        """The part of what enters a layer (:func:`dsv4_convert.golden.layout.carried`) that the call has.

        It has the whole of a drafted block, and the entries of an earlier layer that are complete by its end; later
        ones are zeros, as in a cache.
        """
        parts = {}
        for name, value in entering.items():
            key = TapKey.of(config, layer, name)
            if is_drafted(key, config):
                parts[name] = value
            elif self.cached and of_entries(key):
                parts[name] = self._complete(value, tokens_of_row(key, config))
            else:
                parts[name] = self.take(value)
        return parts

    def take(self, whole: Any) -> Any:
        """The tokens' rows of an array ``[B, tokens, …]``; padding repeats the last one."""
        if not self.cached:
            return whole
        return whole[np.arange(len(self.start))[:, None], np.minimum(self.tokens, whole.shape[1] - 1)]

    def _complete(self, entries: Any, per_row: int) -> Any:
        """Entries ``[B, T, …]``, zeros where the call does not reach the end of their ``per_row`` tokens."""
        complete = np.arange(entries.shape[1]) < ((self.start + self.count) // per_row)[:, None]
        return entries * complete[..., None].astype(entries.dtype)

    def part(self, whole: Array, key: TapKey, config: Config) -> Array:
        """The rows of a tap that the call makes. Entries that it may not complete are zeros."""
        if not self.cached or is_drafted(key, config):
            return whole
        if _handed_on(key, config):
            return self._complete(whole, tokens_of_row(key, config))
        prompt, row, there = self._rows(tokens_of_row(key, config))
        part = np.zeros((*there.shape, *whole.shape[2:]), whole.dtype)
        part[there] = whole[prompt[there], row[there]]
        return part

    def put(self, part: Array, whole: Array, key: TapKey, config: Config) -> None:
        """Write the rows of a tap that the call made to all of it. A drafted block replaces the one before."""
        if is_drafted(key, config) or _handed_on(key, config):
            made = self.count > 0  # a prompt that has ended is drafted after its end already
            whole[made] = part[made]
            return
        prompt, row, there = self._rows(tokens_of_row(key, config))
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
        return [Call(start, count, int(count[0]), len(parts) > 1) for start, count in parts]
    short = np.array([chunk - prompt * chunk // batch for prompt in range(batch)])
    stops = [np.minimum(short + number * chunk, first) for number in range(-(-(first - short.min()) // chunk) + 1)]
    stops += [np.full(batch, token + 1) for token in range(first, tokens)]
    starts = [np.zeros(batch, np.int64), *stops[:-1]]
    return [
        Call(start, stop - start, 1 if start.min() >= first else chunk, True)
        for start, stop in zip(starts, stops, strict=True)
    ]


def _handed_on(key: TapKey, config: Config) -> bool:
    """Whether a tap has entries that an earlier layer made, of which every call has all so far."""
    return of_entries(key) and not (key.layer is not None and config.compresses(key.layer))


def calls_of_draft(batch: int, tokens: int, decode: int, chunk: int | None = None) -> list[Call]:
    """The calls that give a DSpark stage the known tokens. The last token of the prompt begins the block."""
    return calls_of(batch, known_tokens(tokens), max(decode - 1, 0), chunk)
