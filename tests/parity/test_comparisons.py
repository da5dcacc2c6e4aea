"""The comparisons themselves: what passes, what fails, what is a tie; nothing passes by accident."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dsv4_convert.golden.noise import row_sizes
from dsv4_convert.parity.choices import Scores, compare_choices
from dsv4_convert.parity.floor import Floor, floor_of
from dsv4_convert.parity.metrics import Verdict, compare
from dsv4_convert.parity.tolerances import LIMITS

FLOAT32 = LIMITS["float32"]
finite = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=3, max_dims=4, max_side=6),
    elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
)


def _floor(array: np.ndarray, rms: float = 1e-6, peak: float = 1e-6) -> Floor:
    """The same floor in every row, and no rounding of large elements."""
    rows = np.ones(array.shape[:2])
    return Floor(rms * rows, peak * rows, 0.0, rms * rows)


@given(finite)
def test_equal_arrays_pass_at_distance_zero(array: np.ndarray) -> None:
    verdict, distance, _ = compare(array, array, _floor(array), FLOAT32)
    assert verdict is Verdict.PASS
    assert distance is not None
    assert (distance.max_abs, distance.relative_rms, distance.max_ulp, distance.allclose) == (0, 0, 0, 0)
    assert (distance.noise.tap, distance.noise.row, distance.noise.element, distance.rows_outside) == (0, 0, 0, 0)


@given(finite, st.data())
def test_the_measures_are_what_they_say(array: np.ndarray, data: st.DataObject) -> None:
    """Against a few lines of NumPy: multiples of the floor, rows beyond a limit, and where numpy.allclose turns."""
    change = data.draw(hnp.arrays(np.float64, array.shape, elements=st.floats(-3e-5, 3e-5)))
    found = array + change
    error = np.abs(found - array.astype(np.float64)).reshape(*array.shape[:2], -1)
    rows, elements = np.sqrt((error**2).mean(-1)) / 1e-6, error.max(-1) / 1e-6
    whole = np.sqrt((error**2).mean()) / 1e-6
    verdict, distance, _ = compare(found, array, _floor(array), FLOAT32)
    assert distance is not None
    assert distance.noise.row == pytest.approx(rows.max())
    assert distance.noise.element == pytest.approx(elements.max())
    assert distance.noise.tap == pytest.approx(whole)
    outside = (rows > FLOAT32.row) | (elements > FLOAT32.element)
    assert distance.rows_outside == outside.sum()
    assert (verdict is Verdict.PASS) == (not outside.any() and whole <= FLOAT32.tap)
    turns = distance.allclose
    assert np.allclose(found, array.astype(np.float64), atol=turns * 1.001, rtol=turns * 1.001)
    assert turns == 0 or not np.allclose(found, array.astype(np.float64), atol=turns * 0.999, rtol=turns * 0.999)


def test_every_measure_can_fail_alone() -> None:
    """A small error everywhere, a bad row, a bad element: each beyond its own limit and within the others."""
    golden = np.zeros((1, 1000, 100), np.float32)
    floor = _floor(golden)
    everywhere = np.full_like(golden, 15e-6)
    row, element = golden.copy(), golden.copy()
    row[0, 3] = np.where(np.arange(100) % 2, 0, 22e-6)
    element[0, 5, 7] = 30e-6
    for found, measure in ((everywhere, "tap"), (element, "element")):
        verdict, distance, reason = compare(found, golden, floor, FLOAT32)
        assert verdict is Verdict.FAIL
        assert distance is not None
        assert distance.noise.exceeded(FLOAT32) == (measure,)
        assert f"{getattr(distance.noise, measure):.1f} times the noise floor" in reason
    _, distance, _ = compare(row, golden, _floor(golden, rms=0.5e-6, peak=2e-6), FLOAT32)
    assert distance is not None
    assert distance.noise.exceeded(FLOAT32) == ("row",)
    assert distance.worst[1] == 3


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
    ours, theirs = np.array([[found]], np.float32), np.array([[golden]], np.float32)
    assert compare(ours, theirs, _floor(theirs), FLOAT32)[0] is Verdict.FAIL
    measured = floor_of(row_sizes(theirs), np.full((2, 1, 1), np.nan), 2.0**-24)  # the noise of a NaN is one too
    assert compare(ours, theirs, measured, FLOAT32)[0] is Verdict.FAIL


def test_the_same_infinity_passes() -> None:
    array = np.array([[[-np.inf, 1]]], np.float32)
    assert compare(array, array, _floor(array), FLOAT32)[0] is Verdict.PASS


def test_broadcasts_other_dtypes_and_nothing_at_all_do_not_pass() -> None:
    ones = np.ones((1, 3, 1), np.float32)
    floor = _floor(ones)
    assert compare(ones, np.ones((1, 3, 2), np.float32), floor, FLOAT32)[0] is Verdict.FAIL
    assert compare(ones, np.ones((1, 3, 1), np.int32), floor, FLOAT32)[0] is Verdict.FAIL
    assert compare(ones[:, :0], ones[:, :0], None, FLOAT32)[0] is Verdict.EMPTY
    assert compare(ones[:, :0], ones, floor, FLOAT32)[0] is Verdict.FAIL


def test_an_error_without_a_floor_is_infinitely_far() -> None:
    zero = np.zeros((1, 2, 3), np.float32)
    floor = floor_of(row_sizes(zero), np.zeros((2, 1, 2)), 2.0**-24)
    assert compare(zero, zero, floor, FLOAT32)[0] is Verdict.PASS
    verdict, distance, _ = compare(zero + 1e-9, zero, floor, FLOAT32)
    assert verdict is Verdict.FAIL
    assert distance is not None
    assert distance.noise.row == np.inf


def test_distances_by_hand() -> None:
    golden = np.array([[[3.0, -4.0, 0.0, 0.0]]], np.float32)  # rms 2.5
    found = np.array([[[3.0, -4.0, 0.5, 0.0]]], np.float32)
    _, distance, _ = compare(found, golden, _floor(golden), FLOAT32)
    assert distance is not None
    assert distance.max_abs == 0.5
    assert distance.relative_rms == pytest.approx(0.25 / 2.5)
    assert distance.cosine == pytest.approx(25 / (5 * np.sqrt(25.25)))
    assert (distance.worst, distance.found, distance.golden) == ((0, 0, 2), 0.5, 0.0)
    assert distance.max_ulp == 0  # the large elements agree
    nudged = np.nextafter(golden, np.float32(10))
    assert compare(nudged, golden, _floor(golden), FLOAT32)[1].max_ulp == 1


def test_a_floor_is_smoothed_over_its_rows() -> None:
    """The measured noise, but at least one rounding, at least the usual noise of the magnitude, never zero by luck."""
    unit = 2.0**-24
    golden = np.array([[[1.0, 1.0], [1.0, 1.0], [100.0, 100.0], [0.0, 0.0]]], np.float32)
    measured = np.array([[[4e-7, 0.0, 4e-5, 0.0]], [[8e-7, 0.0, 8e-5, 0.0]]], np.float32)
    floor = floor_of(row_sizes(golden), measured, unit)
    usual = np.sqrt(2 * 4e-7**2 / 4)  # relative: two rows of four have it
    median = np.median([4e-7, 4e-5])
    assert floor.rms[0] == pytest.approx([median, median, 4e-5, median], rel=1e-5)
    assert floor.rms[0, 2] >= 100 * usual
    exact = floor_of(row_sizes(golden), np.zeros((2, 1, 4)), unit)
    assert exact.rms[0] == pytest.approx([unit, unit, 100 * unit, 0])
    outlier = np.array([[[1000.0, 0.001]]], np.float32)
    elements = floor_of(row_sizes(outlier), np.full((2, 1, 1), 1e-9), unit).elements(outlier)
    assert elements[0, 0, 0] == pytest.approx(1000 * unit), "rounding one large element is no error"


def _choice(rows: list[list[int]]) -> np.ndarray:
    return np.array([rows], np.int32)


def _scores(rows: list[list[float]], *, peak: float = 1e-5, ours: object = None, visible: object = None) -> Scores:
    golden = np.array([rows], np.float32)
    peaks = np.full(golden.shape[:2], peak)
    floor = Floor(peaks, peaks, 0.0, peaks)
    return Scores(
        golden,
        floor,
        None if ours is None else np.array([ours], np.float32),
        None if visible is None else np.array([visible]),
    )


def test_the_same_set_in_another_order_passes() -> None:
    assert compare_choices(_choice([[1, 0]]), _choice([[0, 1]]), _scores([[3, 2, 1]]), FLOAT32)[0] is Verdict.PASS


@pytest.mark.parametrize(
    ("gap", "expected"),
    [(0.0, Verdict.TIE), (1e-5, Verdict.TIE), (5e-5, Verdict.TIE), (1e-4, Verdict.FAIL), (0.5, Verdict.FAIL)],
)
def test_a_flip_is_a_tie_only_within_the_noise(gap: float, expected: Verdict) -> None:
    scores = _scores([[2.0, 1.0 + gap, 1.0]])
    verdict, flips, _ = compare_choices(_choice([[0, 2]]), _choice([[0, 1]]), scores, FLOAT32)
    assert verdict is expected
    assert flips is not None
    assert flips.margin == pytest.approx(gap, abs=1e-6)
    assert flips.noise == pytest.approx(gap / 1e-5, abs=0.1)
    assert (flips.tokens, flips.ties) == (1, int(expected is Verdict.TIE))


def test_a_flip_against_our_own_scores_is_no_tie() -> None:
    """The golden's scores are tied, but ours say clearly that the golden's choice is better."""
    flip = (_choice([[0, 2]]), _choice([[0, 1]]))
    assert compare_choices(*flip, _scores([[2, 1, 1]], ours=[[2, 1, 1.00001]]), FLOAT32)[0] is Verdict.TIE
    verdict, _, reason = compare_choices(*flip, _scores([[2, 1, 1]], ours=[[2, 1.00001, 1]]), FLOAT32)
    assert verdict is Verdict.FAIL
    assert "own scores" in reason
    nan = compare_choices(*flip, _scores([[2, 1, 1]], ours=[[2, 1, np.nan]]), FLOAT32)
    assert nan[0] is Verdict.FAIL


@pytest.mark.parametrize(
    ("gap", "expected"), [(0.0, Verdict.TIE), (5e-5, Verdict.TIE), (1e-4, Verdict.FAIL), (0.5, Verdict.FAIL)]
)
def test_without_the_golden_s_scores_our_own_say_how_close_it_was(gap: float, expected: Verdict) -> None:
    """As with a compact golden: we chose 2 where the golden chose 1, and our scores of the two are ``gap`` apart."""
    known = _scores([[0, 0, 0]], ours=[[2.0, 1.0, 1.0 + gap]])
    scores = dataclasses.replace(known, golden=None)
    verdict, flips, _ = compare_choices(_choice([[0, 2]]), _choice([[0, 1]]), scores, FLOAT32)
    assert verdict is expected
    assert flips is not None
    assert flips.margin == pytest.approx(gap, abs=1e-6)
    nothing = dataclasses.replace(scores, ours=None)
    assert compare_choices(_choice([[0, 2]]), _choice([[0, 1]]), nothing, FLOAT32)[0] is Verdict.FAIL
    worse = dataclasses.replace(known, golden=None, ours=np.array([[[2.0, 1.0 + 1e-5, 1.0]]], np.float32))
    assert compare_choices(_choice([[0, 2]]), _choice([[0, 1]]), worse, FLOAT32)[0] is Verdict.FAIL, "not our best"


def test_one_real_flip_among_ties_fails() -> None:
    scores = _scores([[1, 1, 0], [1, 0, 0]])
    verdict, flips, _ = compare_choices(_choice([[1], [2]]), _choice([[0], [0]]), scores, FLOAT32)
    assert verdict is Verdict.FAIL
    assert flips is not None
    assert (flips.tokens, flips.ties, flips.worst) == (2, 1, (0, 1))


def test_no_score_excuses_the_future_another_count_a_table_or_a_choice_made_twice() -> None:
    equal = [[1.0, 1.0, 1.0]]
    cases = (
        (_choice([[2]]), _choice([[0]]), _scores(equal, visible=[2])),
        (_choice([[-1]]), _choice([[0]]), _scores(equal)),
        (_choice([[1]]), _choice([[0]]), None),
        (_choice([[0, 0]]), _choice([[0, 1]]), _scores(equal)),
    )
    assert [compare_choices(*case, FLOAT32)[0] for case in cases] == [Verdict.FAIL] * 4
    assert compare_choices(_choice([[2]]), _choice([[0]]), _scores(equal, visible=[3]), FLOAT32)[0] is Verdict.TIE


def test_choices_of_other_shapes_or_dtypes_fail() -> None:
    one = _choice([[0]])
    assert compare_choices(one, _choice([[0, 1]]), None, FLOAT32)[0] is Verdict.FAIL
    assert compare_choices(one.astype(np.float32), one, None, FLOAT32)[0] is Verdict.FAIL
    assert compare_choices(one[:, :0], one[:, :0], None, FLOAT32)[0] is Verdict.EMPTY
