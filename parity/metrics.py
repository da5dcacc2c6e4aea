"""Comparing one tap's real numbers with the golden's: distances, and the verdict under the limits.

Everything is computed in float64. Nothing passes by accident: another shape, another dtype family, a NaN on either
side, or an infinity that is not the same infinity on both sides is a failure.
"""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from typing import Any

import numpy as np

from dsv4_convert.parity.floor import Floor
from dsv4_convert.parity.tolerances import Limits
from dsv4_convert.show.units import number_of

Array = np.ndarray[Any, Any]


class Verdict(StrEnum):
    """The outcome of a comparison."""

    PASS = "pass"
    FAIL = "fail"
    #: A discrete choice differs between scores that are closer than their noise.
    TIE = "tie"
    #: The tap has no elements, such as the entries of a prompt shorter than a block. Says nothing.
    EMPTY = "empty"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiples:
    """An error in multiples of the noise floor, as :mod:`dsv4_convert.parity.tolerances` defines them."""

    tap: float
    row: float
    element: float

    @property
    def largest(self) -> float:
        """Over the whole tap, or in its worst row."""
        return max(self.tap, self.row)

    def exceeded(self, limits: Limits) -> tuple[str, ...]:
        """The measures that are beyond their limit, the farthest first; a multiple that is no number is beyond."""
        shares = self._shares(limits)
        over = [name for name, share in shares.items() if not share <= 1]
        return tuple(sorted(over, key=lambda name: -shares[name]))

    def nearest(self, limits: Limits) -> tuple[str, float, float]:
        """The one measure that words quote: its name, its multiple, and the multiple that is allowed.

        It is :attr:`largest`, which tables and figures show, unless that is within its limit and another is not.
        """
        measure, over = "tap" if self.tap > self.row else "row", self.exceeded(limits)
        if over and measure not in over:
            measure = over[0]
        return measure, getattr(self, measure), getattr(limits, measure)

    def largest_share(self, limits: Limits) -> float:
        """The largest error as a share of its limit."""
        shares = self._shares(limits).values()
        return float("inf") if any(share != share for share in shares) else max(shares)

    def _shares(self, limits: Limits) -> dict[str, float]:
        return {
            "tap": self.tap / limits.tap,
            "row": self.row / limits.row,
            "element": self.element / limits.element,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distance:
    """How far two arrays of real numbers are apart.

    ``noise``: the error in multiples of the noise floor; the verdict is made from it alone. ``max_abs``: largest
    absolute difference. ``relative_rms``: rms of the difference over rms of the golden. ``cosine``: of the flattened
    arrays, nan where one of them is zero. ``max_ulp``: largest difference in units of the last place of float32, over
    elements at least as large as the golden's rms (near zero the unit shrinks without limit and says nothing).
    ``allclose``: the atol = rtol from which ``numpy.allclose`` agrees. ``rows_outside`` of ``rows``: rows with an error
    beyond a limit. ``worst``: index of the element that is farthest beyond it, or nearest to it; ``found`` and
    ``golden`` are the two values there.
    """

    noise: Multiples
    max_abs: float
    relative_rms: float
    cosine: float
    max_ulp: float
    allclose: float
    rows_outside: int
    rows: int
    worst: tuple[int, ...]
    found: float
    golden: float


def compare(found: Array, golden: Array, floor: Floor | None, limits: Limits) -> tuple[Verdict, Distance | None, str]:
    """Verdict, distance and, for a failure, the reason in words.

    The distance is None where none can be computed: other shapes, or no elements, and then ``floor`` may be None.
    """
    if reason := mismatch(found, golden.shape, golden.dtype):
        return Verdict.FAIL, None, reason
    if not found.size or floor is None:
        return Verdict.EMPTY, None, ""
    a, b = found.astype(np.float64), golden.astype(np.float64)
    difference = _difference(a, b)
    elements = _multiple(difference, floor.elements(golden))
    rows = (*golden.shape[:2], -1)
    row_errors = np.sqrt(np.mean(np.square(difference.reshape(rows)), axis=-1))
    row_multiples = _multiple(row_errors, floor.rms)
    noise = Multiples(
        tap=noise_multiple(row_errors, floor),
        row=float(row_multiples.max()),
        element=float(elements.max()),
    )
    outside = (row_multiples > limits.row) | (elements.reshape(rows).max(axis=-1) > limits.element)
    worst = tuple(int(i) for i in np.unravel_index(int(np.argmax(elements)), a.shape))
    distance = _distance(a, b, difference, noise, outside, worst)
    over = noise.exceeded(limits)
    if not over:
        return Verdict.PASS, distance, ""
    if (nans := int(np.count_nonzero(np.isnan(a) | np.isnan(b)))) > 0:
        return Verdict.FAIL, distance, f"{number_of(nans, 'element')} {'is' if nans == 1 else 'are'} NaN"
    return Verdict.FAIL, distance, beyond(*noise.nearest(limits))


def mismatch(found: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    """Why ``found`` cannot be compared with a golden's real numbers of this shape and dtype; empty if it can."""
    if found.shape != shape:
        return f"shape {list(found.shape)}, golden {list(shape)}"
    if not (np.issubdtype(found.dtype, np.floating) and np.issubdtype(dtype, np.floating)):
        return f"dtype {found.dtype}, golden {dtype}: expected real numbers"
    return ""


def rows_beyond(found: Array, golden: Array, floor: Floor, limits: Limits) -> Array:
    """The rows ``[B, S]`` of two comparable arrays with elements whose error is beyond a limit."""
    rows, elements = row_multiples(found, golden, floor)
    beyond: Array = (rows > limits.row) | (elements > limits.element)
    return beyond


def row_multiples(found: Array, golden: Array, floor: Floor) -> tuple[Array, Array]:
    """The rms error of each row and the error of its worst element, in noise floors: two float64 ``[B, S]``."""
    difference = _difference(found.astype(np.float64), golden.astype(np.float64)).reshape(*golden.shape[:2], -1)
    rows = _multiple(np.sqrt(np.mean(np.square(difference), axis=-1)), floor.rms)
    elements = _multiple(difference, floor.elements(golden).reshape(difference.shape)).max(axis=-1)
    return rows, elements


def element_multiples(found: Array, golden: Array, floor: Floor) -> Array:
    """The error of every element of two comparable arrays in multiples of the floor, float64 in their shape."""
    return _multiple(_difference(found.astype(np.float64), golden.astype(np.float64)), floor.elements(golden))


def noise_multiple(difference: Array, floor: Floor) -> float:
    """The measure ``tap`` of a difference ``[B, S, ...]``: its rms over that of the floor."""
    return float(_multiple(_rms(difference), _rms(floor.whole)))


def _difference(a: Array, b: Array) -> Array:
    """Absolute difference; infinite where either is not finite, unless both are the same infinity."""
    finite = np.isfinite(a) & np.isfinite(b)
    difference = np.where(finite, np.abs(np.where(finite, a, 0) - np.where(finite, b, 0)), np.inf)
    difference[np.isinf(a) & (a == b)] = 0
    return difference


def _multiple(error: Array | float, floor: Array | float) -> Array:
    """``error / floor``; 0 where there is no error, infinite where there is one and no floor."""
    error, floor = np.asarray(error, np.float64), np.asarray(floor, np.float64)
    quotient = np.full(np.broadcast_shapes(error.shape, floor.shape), np.inf)
    np.divide(error, floor, out=quotient, where=np.broadcast_to(floor > 0, quotient.shape))
    return np.where(np.broadcast_to(error == 0, quotient.shape), 0.0, quotient)


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _distance(
    a: Array, b: Array, difference: Array, noise: Multiples, outside: Array, worst: tuple[int, ...]
) -> Distance:
    found, golden = float(a[worst]), float(b[worst])
    finite = np.isfinite(a) & np.isfinite(b)
    if not finite.all():
        a, b = np.where(finite, a, 0), np.where(finite, b, 0)
    rms, error = _rms(b), _rms(difference)
    # Not by BLAS, whose threads take longer to meet than a tap of a few thousand elements takes.
    norms = _rms(a) * rms
    large = np.abs(b) >= rms
    ulp = np.spacing(np.abs(b[large]).astype(np.float32)).astype(np.float64)
    return Distance(
        noise=noise,
        max_abs=float(np.max(difference)),
        relative_rms=error / rms if rms else (0.0 if error == 0 else float("inf")),
        cosine=float(np.mean(a * b)) / norms if norms else float("nan"),
        max_ulp=float(np.max(difference[large] / ulp)) if rms else 0.0,
        allclose=float(np.max(difference / (1 + np.abs(b)))),
        rows_outside=int(np.count_nonzero(outside)),
        rows=outside.size,
        worst=worst,
        found=found,
        golden=golden,
    )


#: The place where a measure of an error was taken, in words.
MEASURED = {"tap": "over the whole tap", "row": "in its worst row", "element": "at its worst element"}


def beyond(measure: str, multiple: float, allowed: float) -> str:
    """An error and its limit in words."""
    return f"{shown(multiple)} times the noise floor {MEASURED[measure]}, {allowed:g} allowed"


def shown(multiple: float) -> str:
    """A multiple of the noise floor for people: ``24.3``, ``1.4e5``."""
    return f"{multiple:.1f}" if multiple < 1000 else f"{multiple:.1e}".replace("e+0", "e").replace("e+", "e")
