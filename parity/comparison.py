"""Judging taps against a golden, one layer at a time, in order of execution."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any

import numpy as np

from dsv4_convert.config import Attention, Config
from dsv4_convert.golden.archive import Golden, View
from dsv4_convert.golden.layout import DTYPES, calls, rows_of
from dsv4_convert.golden.noise import Mode
from dsv4_convert.parity.choices import Scores, compare_choices
from dsv4_convert.parity.detail import Detail, Piece
from dsv4_convert.parity.floor import Floor, floor_of, row_sizes
from dsv4_convert.parity.forward import Taken
from dsv4_convert.parity.metrics import Verdict, compare, mismatch, rows_beyond
from dsv4_convert.parity.report import TapResult
from dsv4_convert.parity.tolerances import LIMITS, UNIT, release_unit
from dsv4_convert.taps import Tap, Values, by_name, full_name, is_state, taps_of

Array = np.ndarray[Any, Any]


class Phase(StrEnum):
    """The tokens of a golden that are compared, where some were given one by one."""

    PREFILL = "prefill"
    #: And the state that the first of them starts from.
    DECODE = "decode"


class Comparison:
    """Compares what a model in ``dtype`` gives with a golden and its noise floor of that dtype.

    ``phase``: the tokens that are compared, None for all.
    """

    def __init__(self, golden: Golden, dtype: str, phase: Phase | None = None) -> None:
        self.golden = golden
        self.dtype = dtype
        self._phase = phase
        self._config = golden.config

    def judge(
        self, taken: Taken, mode: Mode, names: Iterable[str], *, fed: bool = False, detail: Detail | None = None
    ) -> list[TapResult]:
        """Results of those of ``names``, in their order, that are in ``taken``.

        ``fed``: every operation was given the golden's own inputs, so a choice was made by the golden's scores.
        ``detail``: takes what pictures need of them.

        Raises:
            UsageError: the golden does not carry the tap, or no noise floor of the dtype.
            BadInput: its bytes are not those that were recorded.
        """
        there = (name for name in names if name in taken)
        if self._phase is Phase.PREFILL:
            there = (name for name in there if not is_state(by_name(name)[0].name))
        return [self._one(name, taken, mode, fed=fed, detail=detail) for name in there]

    def choices(self, layer: int) -> dict[str, Array]:
        """The golden's discrete choices in a layer by tap name within it; none if the layer was not recorded."""
        return {
            name: self.golden.read(full)
            for name, full in self._recorded(layer)
            if by_name(full)[0].values is Values.CHOICE
        }

    def everything(self, layer: int | None) -> dict[str, Array]:
        """Every recorded tap of a layer, or of the model level, by tap name within it."""
        return {name: self.golden.read(full) for name, full in self._recorded(layer)}

    def floor(self, name: str, views: Sequence[View], mode: Mode) -> Floor:
        """The noise floor of a tap that has elements, of which the golden keeps ``views``."""
        first = views[0]
        # The first number of a sketched row is its rms.
        sizes = row_sizes(first.values if first.sketched is None else first.values[..., :1])
        noise = self.golden.noise(name, self.dtype, mode)
        if self.golden.numerics == "plain":
            return floor_of(sizes, noise, UNIT[self.dtype])
        least = release_unit(by_name(name)[0].name, mode)
        return floor_of(sizes, noise, least.row, least.tap)

    def rows_beyond(self, name: str, found: Array, mode: Mode) -> Array:
        """The rows ``[B, S]`` of a tap of the golden's shape whose error is beyond a limit."""
        views = self.golden.views(name)
        floor = self.floor(name, views, mode)
        beyond = np.zeros(found.shape[:2], bool)
        for view in views:
            rows = slice(None) if view.rows is None else list(view.rows)
            beyond[:, rows] |= rows_beyond(view.of(found), view.values, floor.at(view.rows), LIMITS)
        return beyond

    def judge_golden(self, other: Golden, name: str) -> TapResult:
        """What another golden recorded of a tap, as if a model had given it from the tokens.

        Raises:
            UsageError: the other one keeps less of it.
        """
        tap, _ = by_name(name)
        if other.compact != self.golden.compact or tap.values is Values.CHOICE:
            (result,) = self.judge({name: other.read(name)}, Mode.CUMULATIVE, [name])
            return result
        parts = [view.values for view in other.views(name)]
        return self._real(name, parts, self.golden.views(name), Mode.CUMULATIVE)

    def within_phase(self, name: str, part: Array, view: View) -> tuple[Array, View]:
        """Of what the golden keeps of a tap, and the same part of ours, the rows that are compared."""
        return _within(part, view, self._rows(name))

    def _recorded(self, layer: int | None) -> list[tuple[str, str]]:
        if layer is not None and layer not in self.golden.layers:
            return []
        return [(by_name(full)[0].name, full) for full in self.golden.taps(layer)]

    def _one(self, name: str, taken: Taken, mode: Mode, *, fed: bool, detail: Detail | None) -> TapResult:
        tap, layer = by_name(name)
        found = taken[name]
        if tap.values is Values.REAL:
            if reason := mismatch(found, self.golden.shape(name), DTYPES[tap.values]):
                return TapResult(name=name, mode=mode, verdict=Verdict.FAIL, reason=reason, shape=found.shape)
            views = self.golden.views(name)
            return self._real(name, [view.of(found) for view in views], views, mode, detail)
        scores = self._scores(tap, layer, taken, mode, fed=fed)
        rows = self._rows(name)
        golden = self.golden.read(name)
        if rows is not None and found.shape == golden.shape:
            found, golden, scores = found[:, rows], golden[:, rows], None if scores is None else scores.at(rows)
        verdict, flips, reason = compare_choices(found, golden, scores, LIMITS)
        if flips is not None and flips.worst and rows is not None:
            flips = dataclasses.replace(flips, worst=(flips.worst[0], rows[flips.worst[1]]))
        return TapResult(name=name, mode=mode, verdict=verdict, reason=reason, shape=found.shape, flips=flips)

    def _real(
        self, name: str, parts: Sequence[Array], views: Sequence[View], mode: Mode, detail: Detail | None = None
    ) -> TapResult:
        """Compare a tap in every form that the golden has of it: the one that comes out worst counts."""
        shape = self.golden.shape(name)
        floor = self.floor(name, views, mode) if math.prod(shape) else None
        results = []
        pieces = []
        for part, view in zip(parts, views, strict=True):
            form = view.form
            part, view = self.within_phase(name, part, view)
            at = None if floor is None else floor.at(view.rows)
            verdict, distance, reason = compare(part, view.values, at, LIMITS)
            if detail is not None and distance is not None and at is not None:
                pieces.append(Piece(part, view.values, at, view.rows, form))
            if distance is not None and view.rows is not None:
                batch, row, *rest = distance.worst
                distance = dataclasses.replace(distance, worst=(batch, view.rows[row], *rest))
            results.append(
                TapResult(
                    name=name,
                    mode=mode,
                    verdict=verdict,
                    reason=reason,
                    shape=shape,
                    distance=distance,
                    form=form,
                )
            )
        worst = max(results, key=_share)
        if detail is not None:
            detail.add(name, mode, pieces, failing=worst.form if worst.verdict is Verdict.FAIL else None)
        return worst

    def _rows(self, name: str) -> list[int] | None:
        """The rows of a tap that are compared; None for all."""
        tap, layer = by_name(name)
        if self._phase is None or is_state(tap.name):
            return None
        tokens = self.golden.tokens.shape[1]
        first, last = calls(tokens, self.golden.decode)[0]
        start, stop = (first, last) if self._phase is Phase.PREFILL else (last, tokens)
        return list(rows_of(tap, self._config, layer, start, stop))

    def _scores(self, tap: Tap, layer: int | None, taken: Taken, mode: Mode, *, fed: bool) -> Scores | None:
        """What a choice was made by; None where it was made by table, or there is nothing to choose from."""
        scores = next((other for other in taps_of(self._config, layer) if other.name == tap.scores), None)
        if scores is None:
            return None
        name = full_name(scores, layer)
        shape = self.golden.shape(name)
        if not math.prod(shape):
            return None
        views = self.golden.views(name)
        golden = views[0].values if self.golden.whole(name) else None
        ours = golden if fed else taken.get(name)
        return Scores(
            golden=golden,
            floor=self.floor(name, views, mode),
            ours=ours if ours is not None and ours.shape == shape else None,
            visible=_visible(self._config, scores, layer, shape),
        )


def _within(part: Array, view: View, rows: Sequence[int] | None) -> tuple[Array, View]:
    """Those of ``rows`` that are there."""
    if rows is None:
        return part, view
    kept = range(view.values.shape[1]) if view.rows is None else view.rows
    wanted = set(rows)
    places = [place for place, row in enumerate(kept) if row in wanted]
    inside = dataclasses.replace(view, values=view.values[:, places], rows=tuple(kept[place] for place in places))
    return part[:, places], inside


def _share(result: TapResult) -> float:
    return 0.0 if result.distance is None else result.distance.noise.largest_share(LIMITS)


def _visible(config: Config, scores: Tap, layer: int | None, shape: tuple[int, ...]) -> Array | None:
    """Number of compressed entries that each query may choose from; None for a choice of experts."""
    if layer is None or "T" not in scores.shape.split():
        return None
    assert config.attention[layer] is Attention.CSA
    return np.broadcast_to((np.arange(shape[1]) + 1) // config.csa_ratio, shape[:2])
