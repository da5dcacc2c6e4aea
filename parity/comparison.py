"""Judging taps against a golden, one layer at a time, in order of execution."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from dsv4_convert.config import Attention, Config
from dsv4_convert.taps import Tap, Values, by_name, full_name, taps_of
from golden.archive import Golden
from golden.noise import Mode
from parity.choices import Scores, compare_choices
from parity.floor import Floor, floor_of
from parity.forward import Taken
from parity.metrics import compare
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

    def floor(self, name: str, golden: Array, mode: Mode) -> Floor:
        """The noise floor of a tap, whose recorded values are ``golden`` and have elements."""
        return floor_of(golden, self.golden.noise(name, self.dtype, mode), UNIT[self.dtype])

    def _recorded(self, layer: int | None) -> list[tuple[str, str]]:
        if layer is not None and layer not in self.golden.layers:
            return []
        return [(by_name(full)[0].name, full) for full in self.golden.taps(layer)]

    def _one(self, name: str, taken: Taken, mode: Mode, *, fed: bool) -> TapResult:
        tap, layer = by_name(name)
        found, golden = taken[name], self.golden.read(name)
        if tap.values is Values.REAL:
            floor = self.floor(name, golden, mode) if golden.size else None
            verdict, distance, reason = compare(found, golden, floor, LIMITS)
            return TapResult(name=name, mode=mode, verdict=verdict, reason=reason, shape=found.shape, distance=distance)
        scores = self._scores(tap, layer, taken, mode, fed=fed)
        verdict, flips, reason = compare_choices(found, golden, scores, LIMITS)
        return TapResult(name=name, mode=mode, verdict=verdict, reason=reason, shape=found.shape, flips=flips)

    def _scores(self, tap: Tap, layer: int | None, taken: Taken, mode: Mode, *, fed: bool) -> Scores | None:
        """What a choice was made by; None where it was made by table, or there is nothing to choose from."""
        scores = next((other for other in taps_of(self._config, layer) if other.name == tap.scores), None)
        if scores is None:
            return None
        name = full_name(scores, layer)
        golden = self.golden.read(name)
        if not golden.size:
            return None
        ours = golden if fed else taken.get(name)
        return Scores(
            golden=golden,
            floor=self.floor(name, golden, mode),
            ours=ours if ours is not None and ours.shape == golden.shape else None,
            visible=_visible(self._config, scores, layer, golden.shape),
        )


def _visible(config: Config, scores: Tap, layer: int | None, shape: tuple[int, ...]) -> Array | None:
    """Number of compressed entries that each query may choose from; None for a choice of experts."""
    if layer is None or "T" not in scores.shape.split():
        return None
    assert config.attention[layer] is Attention.CSA
    return np.broadcast_to((np.arange(shape[1]) + 1) // config.csa_ratio, shape[:2])
