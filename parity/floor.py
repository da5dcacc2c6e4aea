"""The noise floor of one tap, made fit to divide by: what the golden measured, smoothed over its rows.

One run of the reference is one sample of its rounding. In a row of few elements that sample is small by luck now and
then, and an exact zero says nothing. So a row's floor is the largest of

* what was measured in the row itself;
* its magnitude times the relative noise of the whole tap, which is at least one rounding of the dtype;
* the median of what was measured in the rows, which stands in for rows whose magnitude is zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv4_convert.golden.noise import PEAK, RMS

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Floor:
    """``rms`` and ``peak``: rms and largest error of the reference in each row, float64 ``[B, S]``.

    ``unit`` is the unit roundoff of the dtype: an element's own rounding is never below ``unit * |element|``.
    ``whole`` is ``rms`` where the tap is judged as a whole, in which single values count for less.
    """

    rms: Array
    peak: Array
    unit: float
    whole: Array

    def elements(self, golden: Array) -> Array:
        """Largest error of the reference at every element, float64 in the shape of ``golden``."""
        rows = self.peak.reshape(*self.peak.shape, *(1,) * (golden.ndim - 2))
        return np.maximum(rows, self.unit * magnitude(golden))

    def at(self, rows: Sequence[int] | None) -> Floor:
        """The floor of some rows of axis 1; of all for None."""
        if rows is None:
            return self
        return Floor(self.rms[:, rows], self.peak[:, rows], self.unit, self.whole[:, rows])


def floor_of(sizes: Array, noise: Array, unit: float, unit_whole: float | None = None) -> Floor:
    """The floor of a tap with elements, from its measured noise ``[2, B, S]`` and the rms of its rows ``[B, S]``.

    ``unit_whole`` is the least relative noise of the tap as a whole, where it is less than ``unit``.
    """
    measured = noise.astype(np.float64)
    rms, peak = (_smooth(measured[part], sizes, unit) for part in (RMS, PEAK))
    return Floor(rms, peak, unit, rms if unit_whole is None else _smooth(measured[RMS], sizes, unit_whole))


def row_sizes(golden: Array) -> Array:
    """The rms of every row of ``[B, S, ...]``, float64 ``[B, S]``; elements that are not finite count as 0."""
    sizes: Array = np.sqrt(np.mean(np.square(magnitude(golden).reshape(*golden.shape[:2], -1)), axis=-1))
    return sizes


def magnitude(values: Array) -> Array:
    """Absolute values in float64, 0 where a value is not finite."""
    return np.where(np.isfinite(values), np.abs(values.astype(np.float64)), 0.0)


def _smooth(measured: Array, sizes: Array, unit: float) -> Array:
    relative = np.divide(measured, sizes, out=np.zeros_like(measured), where=sizes > 0)
    typical = max(float(np.sqrt(np.mean(np.square(relative)))), unit)
    nonzero = measured[measured > 0]
    median = float(np.median(nonzero)) if nonzero.size else 0.0
    return np.maximum(np.maximum(measured, typical * sizes), median)
