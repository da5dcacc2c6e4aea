"""The comparisons themselves: what passes, what fails, what is a tie; nothing passes by accident."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from parity.choices import compare_choices
from parity.metrics import Verdict, compare
from parity.tolerances import Tolerance

TOLERANCE = Tolerance(atol=1e-5, rtol=1e-5)
finite = hnp.arrays(
    np.float32, hnp.array_shapes(max_dims=3, max_side=6), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
)


@given(finite)
def test_equal_arrays_pass_at_distance_zero(array: np.ndarray) -> None:
    verdict, distance, _ = compare(array, array, TOLERANCE)
    assert verdict is Verdict.PASS
    assert distance is not None
    assert (distance.max_abs, distance.relative_rms, distance.max_ulp, distance.outside) == (0, 0, 0, 0)


@given(finite, st.data())
def test_agrees_with_numpy_and_counts_every_element_outside(array: np.ndarray, data: st.DataObject) -> None:
    noise = data.draw(
        hnp.arrays(np.float32, array.shape, elements=st.floats(-0.0078125, 0.0078125, width=32, allow_subnormal=False))
    )
    found = array + noise
    verdict, distance, _ = compare(found, array, TOLERANCE)
    close = np.isclose(found.astype(np.float64), array.astype(np.float64), atol=1e-5, rtol=1e-5)
    assert (verdict is Verdict.PASS) == bool(close.all())
    assert distance is not None
    assert distance.outside == np.count_nonzero(~close)
    assert distance.max_abs == np.abs(found.astype(np.float64) - array.astype(np.float64)).max()


@pytest.mark.parametrize(
    ("found", "golden"),
    [
        ([np.nan, 1], [np.nan, 1]),
        ([np.nan, 1], [0, 1]),
        ([0, 1], [np.nan, 1]),
        ([np.inf, 1], [0, 1]),
        ([0, 1], [np.inf, 1]),
        ([np.inf, 1], [-np.inf, 1]),
    ],
)
def test_nan_and_unequal_infinity_fail(found: list[float], golden: list[float]) -> None:
    assert compare(np.array(found, np.float32), np.array(golden, np.float32), TOLERANCE)[0] is Verdict.FAIL


def test_the_same_infinity_passes() -> None:
    array = np.array([-np.inf, 1], np.float32)
    assert compare(array, array, TOLERANCE)[0] is Verdict.PASS


def test_broadcasts_other_dtypes_and_nothing_at_all_do_not_pass() -> None:
    ones = np.ones((3, 1), np.float32)
    assert compare(ones, np.ones((3, 2), np.float32), TOLERANCE)[0] is Verdict.FAIL
    assert compare(ones, np.ones((3, 1), np.int32), TOLERANCE)[0] is Verdict.FAIL
    assert compare(ones[:0], ones[:0], TOLERANCE)[0] is Verdict.EMPTY
    assert compare(ones[:0], ones, TOLERANCE)[0] is Verdict.FAIL


def test_distances_by_hand() -> None:
    golden = np.array([3.0, -4.0, 0.0, 0.0], np.float32)  # rms 2.5
    found = np.array([3.0, -4.0, 0.5, 0.0], np.float32)
    _, distance, reason = compare(found, golden, TOLERANCE)
    assert distance is not None
    assert distance.max_abs == 0.5
    assert distance.relative_rms == pytest.approx(0.25 / 2.5)
    assert distance.cosine == pytest.approx(25 / (5 * np.sqrt(25.25)))
    assert distance.worst == (2,)
    assert distance.max_ulp == 0  # the large elements agree
    assert "1 of 4 elements" in reason
    nudged = np.nextafter(golden, np.float32(10))
    assert compare(nudged, golden, TOLERANCE)[1].max_ulp == 1


def test_zero_golden_has_no_relative_error_to_speak_of() -> None:
    zero = np.zeros(3, np.float32)
    assert compare(zero, zero, TOLERANCE)[1].relative_rms == 0
    assert compare(zero + 1, zero, TOLERANCE)[1].relative_rms == np.inf


def _choice(rows: list[list[int]]) -> np.ndarray:
    return np.array([rows], np.int32)


def test_the_same_set_in_another_order_passes() -> None:
    scores = np.array([[[3.0, 2.0, 1.0]]], np.float32)
    assert compare_choices(_choice([[1, 0]]), _choice([[0, 1]]), scores, None, TOLERANCE)[0] is Verdict.PASS


@pytest.mark.parametrize(
    ("gap", "expected"), [(0.0, Verdict.TIE), (1e-5, Verdict.TIE), (1e-3, Verdict.FAIL), (0.5, Verdict.FAIL)]
)
def test_a_flip_is_a_tie_only_within_the_noise(gap: float, expected: Verdict) -> None:
    scores = np.array([[[2.0, 1.0 + gap, 1.0]]], np.float32)
    verdict, flips, _ = compare_choices(_choice([[0, 2]]), _choice([[0, 1]]), scores, None, TOLERANCE)
    assert verdict is expected
    assert flips is not None
    assert flips.margin == pytest.approx(gap, abs=1e-6)
    assert (flips.tokens, flips.ties) == (1, int(expected is Verdict.TIE))


def test_one_real_flip_among_ties_fails() -> None:
    scores = np.array([[[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]], np.float32)
    verdict, flips, _ = compare_choices(_choice([[1], [2]]), _choice([[0], [0]]), scores, None, TOLERANCE)
    assert verdict is Verdict.FAIL
    assert flips is not None
    assert (flips.tokens, flips.ties, flips.worst) == (2, 1, (0, 1))


def test_no_score_excuses_the_future_another_count_or_a_table() -> None:
    equal = np.ones((1, 1, 3), np.float32)
    future = compare_choices(_choice([[2]]), _choice([[0]]), equal, np.array([[2]]), TOLERANCE)
    fewer = compare_choices(_choice([[-1]]), _choice([[0]]), equal, np.array([[3]]), TOLERANCE)
    table = compare_choices(_choice([[1]]), _choice([[0]]), None, None, TOLERANCE)
    twice = compare_choices(_choice([[0, 0]]), _choice([[0, 1]]), None, None, TOLERANCE)
    assert [result[0] for result in (future, fewer, table, twice)] == [Verdict.FAIL] * 4
    assert compare_choices(_choice([[2]]), _choice([[0]]), equal, np.array([[3]]), TOLERANCE)[0] is Verdict.TIE


def test_choices_of_other_shapes_or_dtypes_fail() -> None:
    one = _choice([[0]])
    assert compare_choices(one, _choice([[0, 1]]), None, None, TOLERANCE)[0] is Verdict.FAIL
    assert compare_choices(one.astype(np.float32), one, None, None, TOLERANCE)[0] is Verdict.FAIL
    assert compare_choices(one[:, :0], one[:, :0], None, None, TOLERANCE)[0] is Verdict.EMPTY
