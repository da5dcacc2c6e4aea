"""The noise floor of one tap as a divisor: the measured noise, smoothed over the rows.

One run of the reference is one sample of its rounding. A row of few elements may have little noise by luck, and a zero
says nothing. A row's floor is therefore the largest of three values. The first is the noise that was measured in the
row. The second is the row's magnitude times the relative noise of the whole tap, which is at least one rounding of the
dtype. The third is the median of the noise measured in the rows; it serves rows whose magnitude is zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv4_convert.golden.noise import PEAK, RMS, magnitude

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Floor:
    """``rms`` and ``peak``: rms and largest error of the reference in each row, float64 ``[B, S]``.

    ``unit`` is the unit roundoff of the dtype: an element's own rounding is never below ``unit * |element|``.
    ``whole`` replaces ``rms`` when the tap is judged as a whole, in which single values count for less.
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


def _smooth(measured: Array, sizes: Array, unit: float) -> Array:
    relative = np.divide(measured, sizes, out=np.zeros_like(measured), where=sizes > 0)
    typical = max(float(np.sqrt(np.mean(np.square(relative)))), unit)
    nonzero = measured[measured > 0]
    median = float(np.median(nonzero)) if nonzero.size else 0.0
    return np.maximum(np.maximum(measured, typical * sizes), median)
