"""Numbers that only the figures of a report need: errors token by token, and samples of failing taps.

A run collects them only if it is asked to. Memory does not grow with the width of a tap: each layer keeps two numbers
per token, and a few failing taps keep a sample.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv4_convert.golden.archive import Golden, TapForm
from dsv4_convert.golden.layout import STREAMS, is_drafted, of_entries
from dsv4_convert.golden.noise import Mode
from dsv4_convert.parity.floor import Floor
from dsv4_convert.parity.logits import Position
from dsv4_convert.parity.metrics import element_multiples, row_multiples
from dsv4_convert.parity.tolerances import Limits
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.taps import TapKey

Array = np.ndarray[Any, Any]

#: Samples kept in each mode: of the first failing tap of a layer, for so many layers.
SAMPLES = 4
#: Points of a sample; this many of them are those with the largest errors.
POINTS = 1500
_FARTHEST = 250
#: Rows that are searched for them, since a tap of a long prompt has too many elements to sort.
_ROWS = 64
#: Edges between which errors are counted, in noise floors: quarters of decades.
EDGES = 10.0 ** (np.arange(-8, 49) / 4)


@dataclasses.dataclass(frozen=True)
class ComparedPart:
    """The compared part of a tap: ``found`` and ``golden`` ``[B, rows, ...]``, and their noise floor.

    ``rows`` are its rows of axis 1 (None: all), ``form`` is the form in which the golden keeps them.
    """

    found: Array
    golden: Array
    floor: Floor
    rows: Sequence[int] | None
    form: TapForm


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The shape of the prompts, and the model that read them; the last ``decode`` tokens came one by one."""

    prompts: int
    tokens: int
    first_position: int
    decode: int
    config: Config


@dataclasses.dataclass(frozen=True)
class TokenErrors:
    """Errors of one layer at each token, in noise floors: float32 ``[B, S]``, NaN where nothing was compared.

    ``streams``: the error of the streams that leave the layer. ``worst``: the largest error of its taps.
    """

    streams: Array
    worst: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Numbers of a failing tap, compared in ``form``.

    ``counts``: elements whose error is between two of :data:`EDGES`; the first count is below all edges, the last above
    all. ``exact``: elements without an error; ``infinite``: elements whose error is not finite. ``found``, ``golden``
    and ``multiples``, float64 ``[points]``, are values and errors of some elements, the largest errors first.
    ``tokens``: float32 ``[B, S]``, the error at each token, NaN where nothing was compared.
    """

    key: TapKey
    mode: Mode
    form: TapForm
    counts: Array
    exact: int
    infinite: int
    found: Array
    golden: Array
    multiples: Array
    tokens: Array

    @property
    def elements(self) -> int:
        """Number of elements in the tap."""
        return int(self.counts.sum()) + self.exact + self.infinite


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetailPart:
    """The part of :class:`Detail` that a step of a run fills."""

    tokens: tuple[tuple[Mode, int | None, TokenErrors], ...]
    samples: tuple[Sample, ...]
    positions: tuple[tuple[Mode, tuple[Position, ...]], ...]


class Detail:
    """Filled by :class:`dsv4_convert.parity.run.ParityRun` as it goes.

    Attributes:
        prompt: what the positions mean.
        tokens: by mode and layer (None: the model level), errors token by token.
        samples: in order of execution within each mode.
        positions: by mode, the next-token distribution at every position that the golden has.
    """

    def __init__(self, golden: Golden, limits: Limits) -> None:
        batch, tokens = golden.tokens.shape
        first = golden.manifest.request.first_position
        self.prompt = Prompt(batch, tokens, first, golden.decode, golden.config)
        self._limits = limits
        self.tokens: dict[tuple[Mode, int | None], TokenErrors] = {}
        self.samples: list[Sample] = []
        self.positions: dict[Mode, Sequence[Position]] = {}

    def add(self, key: TapKey, mode: Mode, parts: Sequence[ComparedPart], *, failing: TapForm | None) -> None:
        """One tap of real numbers; ``failing``: the form in which it fails, None if it does not."""
        if not parts:
            return
        errors = self._by_token(key, parts)
        if not key.tap.is_state:  # the tokens that its rows belong to have them already
            of_layer = self.tokens.setdefault((mode, key.layer), TokenErrors(self._nothing(), self._nothing()))
            np.fmax(of_layer.worst, errors, out=of_layer.worst)
            if key.tap is STREAMS:
                np.fmax(of_layer.streams, errors, out=of_layer.streams)
        of_mode = [sample for sample in self.samples if sample.mode is mode]
        if failing is None or len(of_mode) >= SAMPLES or key.layer in (sample.key.layer for sample in of_mode):
            return
        (part,) = (part for part in parts if part.form is failing)
        self.samples.append(_sample(key, mode, part, errors))

    def part(self, layer: int | None, samples: int) -> DetailPart:
        """The detail of one layer, with the samples after the first ``samples``."""
        return DetailPart(
            tokens=tuple((mode, of, errors) for (mode, of), errors in self.tokens.items() if of == layer),
            samples=tuple(self.samples[samples:]),
            positions=tuple((mode, tuple(positions)) for mode, positions in self.positions.items()),
        )

    def add_part(self, part: DetailPart) -> None:
        """Add a part of another run of the same comparison."""
        self.tokens |= {(mode, layer): errors for mode, layer, errors in part.tokens}
        self.samples += part.samples
        self.positions |= dict(part.positions)

    def _by_token(self, key: TapKey, parts: Sequence[ComparedPart]) -> Array:
        """The largest error of each token, of whichever part has it."""
        errors, ratio = self._nothing(), 1
        if key.tap.is_state:
            return errors
        if of_entries(key):
            assert key.layer is not None
            ratio = self.prompt.config.ratio_of(key.layer)
        for part in parts:
            multiples = _largest(part, self._limits)
            if is_drafted(key, self.prompt.config):  # the block begins with the last token
                errors[:, -1] = np.fmax(errors[:, -1], np.fmax.reduce(multiples, axis=1))
                continue
            kept = np.arange(multiples.shape[1]) if part.rows is None else np.asarray(part.rows, np.int64)
            # A compressed entry stands at the last token of its block, from which on it is there.
            at = (kept + 1) * ratio - 1
            errors[:, at] = np.fmax(errors[:, at], multiples)
        return errors

    def _nothing(self) -> Array:
        return np.full((self.prompt.prompts, self.prompt.tokens), np.nan, np.float32)


def _largest(part: ComparedPart, limits: Limits) -> Array:
    """The larger of each row's two measures, on the scale of the row limit: float32 ``[B, rows]``."""
    rows, elements = row_multiples(part.found, part.golden, part.floor)
    return np.maximum(rows, elements * (limits.row / limits.element)).astype(np.float32)


def _sample(key: TapKey, mode: Mode, part: ComparedPart, tokens: Array) -> Sample:
    multiples = element_multiples(part.found, part.golden, part.floor).reshape(-1)
    finite = multiples[np.isfinite(multiples)]
    counts = np.bincount(np.searchsorted(EDGES, finite[finite > 0]), minlength=len(EDGES) + 1)
    at = _chosen(multiples, math.prod(part.golden.shape[:2]))
    return Sample(
        key=key,
        mode=mode,
        form=part.form,
        counts=counts,
        exact=int(np.count_nonzero(finite == 0)),
        infinite=multiples.size - finite.size,
        found=part.found.reshape(-1)[at].astype(np.float64),
        golden=part.golden.reshape(-1)[at].astype(np.float64),
        multiples=multiples[at],
        tokens=tokens,
    )


def _chosen(multiples: Array, rows: int) -> Array:
    """Indices of a sample of the elements: the farthest off first, then some of all, the same in every run."""
    size = multiples.size // rows
    by_row = multiples.reshape(rows, size).max(axis=1)
    worst_rows = np.sort(np.argsort(-by_row, kind="stable")[:_ROWS])
    candidates = (worst_rows[:, None] * size + np.arange(size)).reshape(-1)
    farthest = candidates[np.argsort(-multiples[candidates], kind="stable")[:_FARTHEST]]
    rest = np.random.default_rng(0).choice(multiples.size, min(POINTS, multiples.size), replace=False)
    rest = np.setdiff1d(rest, farthest)[: POINTS - len(farthest)]
    return np.concatenate([farthest, rest])
