"""Comparing one tap's real numbers with the golden's: distances, and the verdict under a tolerance.

Everything is computed in float64. Nothing passes by accident: another shape, another dtype family, a NaN on either
side, or an infinity that is not the same infinity on both sides is a failure.
"""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from typing import Any

import numpy as np

from parity.tolerances import Tolerance

Array = np.ndarray[Any, Any]


class Verdict(StrEnum):
    """What a comparison says."""

    PASS = "pass"
    FAIL = "fail"
    #: A discrete choice differs between scores that are closer than the tolerance.
    TIE = "tie"
    #: The tap has no elements, such as the entries of a prompt shorter than a block. Says nothing.
    EMPTY = "empty"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distance:
    """How far two arrays of real numbers are apart.

    ``max_abs``: largest absolute difference. ``relative_rms``: rms of the difference over rms of the golden.
    ``cosine``: of the flattened arrays, nan where one of them is zero. ``max_ulp``: largest difference in units of
    the last place of float32, over elements at least as large as the golden's rms (near zero the unit shrinks without
    limit and says nothing). ``outside``: elements beyond the tolerance. ``worst``: index of the element that is
    farthest beyond it, or nearest to it.
    """

    max_abs: float
    relative_rms: float
    cosine: float
    max_ulp: float
    outside: int
    worst: tuple[int, ...]


def compare(found: Array, golden: Array, tolerance: Tolerance) -> tuple[Verdict, Distance | None, str]:
    """Verdict, distance and, for a failure, the reason in words.

    The distance is None where none can be computed: other shapes, or no elements.
    """
    if found.shape != golden.shape:
        return Verdict.FAIL, None, f"shape {list(found.shape)}, golden {list(golden.shape)}"
    if not (np.issubdtype(found.dtype, np.floating) and np.issubdtype(golden.dtype, np.floating)):
        return Verdict.FAIL, None, f"dtype {found.dtype}, golden {golden.dtype}: expected real numbers"
    if not found.size:
        return Verdict.EMPTY, None, ""
    a, b = found.astype(np.float64), golden.astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    same_infinity = np.isinf(a) & (a == b)
    difference = np.where(finite, np.abs(np.where(finite, a, 0) - np.where(finite, b, 0)), np.inf)
    difference[same_infinity] = 0
    # How many tolerances away; exactly 1 still passes.
    excess = difference / (tolerance.atol + tolerance.rtol * np.where(finite, np.abs(b), 0))
    outside = int(np.count_nonzero(excess > 1))
    worst = tuple(int(i) for i in np.unravel_index(int(np.argmax(excess)), a.shape))
    distance = _distance(a, b, difference, finite, outside, worst)
    if not outside:
        return Verdict.PASS, distance, ""
    if (nans := int(np.count_nonzero(np.isnan(a) | np.isnan(b)))) > 0:
        return Verdict.FAIL, distance, f"{nans} element(s) are NaN"
    return (
        Verdict.FAIL,
        distance,
        f"{outside} of {a.size} elements beyond atol {tolerance.atol:.2g}, rtol {tolerance.rtol:.2g}",
    )


def _distance(a: Array, b: Array, difference: Array, finite: Array, outside: int, worst: tuple[int, ...]) -> Distance:
    if not finite.all():
        a, b = np.where(finite, a, 0), np.where(finite, b, 0)
    rms = float(np.sqrt(np.mean(np.square(b))))
    error = float(np.sqrt(np.mean(np.square(difference))))
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    large = np.abs(b) >= rms
    ulp = np.spacing(np.abs(b[large]).astype(np.float32)).astype(np.float64)
    return Distance(
        max_abs=float(np.max(difference)),
        relative_rms=error / rms if rms else (0.0 if error == 0 else float("inf")),
        cosine=float(np.dot(a.ravel(), b.ravel())) / norms if norms else float("nan"),
        max_ulp=float(np.max(difference[large] / ulp)) if rms else 0.0,
        outside=outside,
        worst=worst,
    )
