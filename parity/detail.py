"""What pictures of a parity run need beyond its report: errors token by token, and numbers out of taps that fail.

Collected while the run goes on, and only if it is asked for. Memory does not grow with the width of a tap: of every
layer two numbers per token are kept, and of a few failing taps a sample.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv4_convert.config import Config
from dsv4_convert.golden.archive import Form, Golden
from dsv4_convert.golden.layout import STREAMS
from dsv4_convert.golden.noise import Mode
from dsv4_convert.parity.floor import Floor
from dsv4_convert.parity.logits import Position
from dsv4_convert.parity.metrics import element_multiples, row_multiples
from dsv4_convert.parity.tolerances import LIMITS
from dsv4_convert.taps import by_name, is_state

Array = np.ndarray[Any, Any]

#: Taps of each mode of which a sample is kept: the first that fails of each layer, of so many layers.
SAMPLES = 4
#: Points of a sample, and how many of them are the farthest off.
POINTS = 1500
_FARTHEST = 250
#: Rows in which the farthest are looked for, since a tap of a long prompt has more elements than can be sorted.
_ROWS = 64
#: Edges between which errors are counted, in noise floors: quarters of decades.
EDGES = 10.0 ** (np.arange(-8, 49) / 4)


@dataclasses.dataclass(frozen=True)
class Piece:
    """What was compared of a tap: ``found`` and ``golden`` ``[B, rows, ...]``, the floor there, which rows of axis 1
    these are (None: all), and the form in which the golden keeps them."""

    found: Array
    golden: Array
    floor: Floor
    rows: Sequence[int] | None
    form: Form


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the positions of a prompt mean to a model; ``decode`` of its last tokens came one by one."""

    prompts: int
    tokens: int
    first_position: int
    decode: int
    config: Config


@dataclasses.dataclass(frozen=True)
class TokenErrors:
    """Of one layer, float32 ``[B, S]``, NaN where nothing is known: the multiple of the noise floor at each token.

    ``streams``: of the streams that leave the layer. ``worst``: of its tap that is farthest off there.
    """

    streams: Array
    worst: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Numbers of a failing tap, compared in ``form``.

    ``counts``: elements whose error is between two of :data:`EDGES`, the first count being below all of them and the
    last beyond. ``exact``: elements without an error; ``infinite``: with one that is no number. Of some elements,
    the farthest off among them, ``found``, ``golden`` and their ``multiples``, float64 ``[points]``, farthest first.
    """

    name: str
    mode: Mode
    form: Form
    counts: Array
    exact: int
    infinite: int
    found: Array
    golden: Array
    multiples: Array

    @property
    def elements(self) -> int:
        """How many there are in the tap."""
        return int(self.counts.sum()) + self.exact + self.infinite


class Detail:
    """Filled by :func:`dsv4_convert.parity.run.run` as it goes.

    Attributes:
        prompt: what the positions mean.
        tokens: by mode and layer (None: the model level), errors token by token.
        samples: in order of execution within each mode.
        positions: by mode, the next-token distribution at every position that the golden has.
    """

    def __init__(self, golden: Golden) -> None:
        batch, tokens = golden.tokens.shape
        first = golden.manifest.request.first_position
        self.prompt = Prompt(batch, tokens, first, golden.decode, golden.config)
        self.tokens: dict[tuple[Mode, int | None], TokenErrors] = {}
        self.samples: list[Sample] = []
        self.positions: dict[Mode, Sequence[Position]] = {}

    def add(self, name: str, mode: Mode, pieces: Sequence[Piece], *, failing: Form | None) -> None:
        """One tap of real numbers; ``failing``: the form in which it fails, None if it does not."""
        if not pieces:
            return
        self._add_tokens(name, mode, pieces)
        layer = by_name(name)[1]
        of_mode = [sample for sample in self.samples if sample.mode is mode]
        if failing is None or len(of_mode) >= SAMPLES or layer in (by_name(sample.name)[1] for sample in of_mode):
            return
        (piece,) = (piece for piece in pieces if piece.form is failing)
        self.samples.append(_sample(name, mode, piece))

    def _add_tokens(self, name: str, mode: Mode, pieces: Sequence[Piece]) -> None:
        tap, layer = by_name(name)
        if is_state(tap.name):
            return  # its rows are those of a few tokens, which have them already
        errors = self.tokens.setdefault((mode, layer), self._nothing())
        ratio = 1
        if tap.shape.split()[1] == "T":
            assert layer is not None
            ratio = self.prompt.config.ratio(self.prompt.config.attention[layer])
        for piece in pieces:
            multiples = _largest(piece)
            kept = np.arange(multiples.shape[1]) if piece.rows is None else np.asarray(piece.rows, np.int64)
            # A compressed entry stands at the last token of its block, from which on it is there.
            at = (kept + 1) * ratio - 1
            errors.worst[:, at] = np.fmax(errors.worst[:, at], multiples)
            if tap.name == STREAMS:
                errors.streams[:, at] = np.fmax(errors.streams[:, at], multiples)

    def _nothing(self) -> TokenErrors:
        shape = (self.prompt.prompts, self.prompt.tokens)
        return TokenErrors(np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32))


def _largest(piece: Piece) -> Array:
    """Of each row the larger of its two measures, on the scale of the limit of rows: float32 ``[B, rows]``."""
    rows, elements = row_multiples(piece.found, piece.golden, piece.floor)
    return np.maximum(rows, elements * (LIMITS.row / LIMITS.element)).astype(np.float32)


def _sample(name: str, mode: Mode, piece: Piece) -> Sample:
    multiples = element_multiples(piece.found, piece.golden, piece.floor).reshape(-1)
    finite = multiples[np.isfinite(multiples)]
    counts = np.bincount(np.searchsorted(EDGES, finite[finite > 0]), minlength=len(EDGES) + 1)
    at = _chosen(multiples, math.prod(piece.golden.shape[:2]))
    return Sample(
        name=name,
        mode=mode,
        form=piece.form,
        counts=counts,
        exact=int(np.count_nonzero(finite == 0)),
        infinite=multiples.size - finite.size,
        found=piece.found.reshape(-1)[at].astype(np.float64),
        golden=piece.golden.reshape(-1)[at].astype(np.float64),
        multiples=multiples[at],
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
