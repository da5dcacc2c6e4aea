"""Judging taps against a golden, one layer at a time, in order of execution."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dsv4_convert.config import Attention, Config
from dsv4_convert.taps import Tap, Values, by_name, full_name, taps_of
from golden.archive import Golden, View
from golden.layout import DTYPES
from golden.noise import Mode
from parity.choices import Scores, compare_choices
from parity.floor import Floor, floor_of, row_sizes
from parity.forward import Taken
from parity.metrics import Verdict, compare, mismatch, rows_beyond
from parity.report import TapResult
from parity.tolerances import LIMITS, UNIT

Array = np.ndarray[Any, Any]


class Comparison:
    """Compares what a model in ``dtype`` gives with a golden and its noise floor of that dtype."""

    def __init__(self, golden: Golden, dtype: str) -> None:
        self.golden = golden
        self.dtype = dtype
        self._config = golden.config

    def judge(self, taken: Taken, mode: Mode, names: Iterable[str], *, fed: bool = False) -> list[TapResult]:
        """Results of those of ``names``, in their order, that are in ``taken``.

        ``fed``: every operation was given the golden's own inputs, so a choice was made by the golden's scores.

        Raises:
            UsageError: the golden does not carry the tap, or no noise floor of the dtype.
            BadInput: its bytes are not those that were recorded.
        """
        return [self._one(name, taken, mode, fed=fed) for name in names if name in taken]

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
        return floor_of(sizes, self.golden.noise(name, self.dtype, mode), UNIT[self.dtype])

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

    def _recorded(self, layer: int | None) -> list[tuple[str, str]]:
        if layer is not None and layer not in self.golden.layers:
            return []
        return [(by_name(full)[0].name, full) for full in self.golden.taps(layer)]

    def _one(self, name: str, taken: Taken, mode: Mode, *, fed: bool) -> TapResult:
        tap, layer = by_name(name)
        found = taken[name]
        if tap.values is Values.REAL:
            if reason := mismatch(found, self.golden.shape(name), DTYPES[tap.values]):
                return TapResult(name=name, mode=mode, verdict=Verdict.FAIL, reason=reason, shape=found.shape)
            views = self.golden.views(name)
            return self._real(name, [view.of(found) for view in views], views, mode)
        scores = self._scores(tap, layer, taken, mode, fed=fed)
        verdict, flips, reason = compare_choices(found, self.golden.read(name), scores, LIMITS)
        return TapResult(name=name, mode=mode, verdict=verdict, reason=reason, shape=found.shape, flips=flips)

    def _real(self, name: str, parts: Sequence[Array], views: Sequence[View], mode: Mode) -> TapResult:
        """Compare a tap in every form that the golden has of it: the one that comes out worst counts."""
        shape = self.golden.shape(name)
        floor = self.floor(name, views, mode) if math.prod(shape) else None
        results = []
        for part, view in zip(parts, views, strict=True):
            at = None if floor is None else floor.at(view.rows)
            verdict, distance, reason = compare(part, view.values, at, LIMITS)
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
                    form=view.form,
                )
            )
        return max(results, key=_share)

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


def _share(result: TapResult) -> float:
    return 0.0 if result.distance is None else result.distance.noise.largest_share(LIMITS)


def _visible(config: Config, scores: Tap, layer: int | None, shape: tuple[int, ...]) -> Array | None:
    """Number of compressed entries that each query may choose from; None for a choice of experts."""
    if layer is None or "T" not in scores.shape.split():
        return None
    assert config.attention[layer] is Attention.CSA
    return np.broadcast_to((np.arange(shape[1]) + 1) // config.csa_ratio, shape[:2])
