"""Comparing discrete choices: the experts of a token, the compressed entries of a query.

Choices are compared as sets, token by token. A difference between candidates whose scores are closer than twice the
tolerance of the scores is a *tie*: either side's rounding may decide it. Any other difference is a failure.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from parity.metrics import Verdict
from parity.tolerances import Tolerance

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flips:
    """``tokens``: tokens whose set differs, of ``of`` tokens. ``ties``: those of them that are ties.

    ``margin``: the golden's score of what it chose minus its score of what was chosen instead, largest over the
    failing tokens, or over the ties if nothing fails; 0 without flips. ``worst``: index of that token, ``(b, s)``.
    """

    tokens: int
    of: int
    ties: int
    margin: float
    worst: tuple[int, ...]


def compare_choices(
    found: Array, golden: Array, scores: Array | None, visible: Array | None, tolerance: Tolerance
) -> tuple[Verdict, Flips | None, str]:
    """Compare ``[B, S, k]`` indices, -1 for none.

    Args:
        found: our choice.
        golden: the golden's.
        scores: the golden's scores ``[B, S, candidates]`` behind the choice; None where there are none (hash routing),
            so that any difference is a failure.
        visible: number of candidates that a token may choose from, ``[B, S]``: the first ones. None: all.
        tolerance: of the scores.
    """
    if found.shape != golden.shape:
        return Verdict.FAIL, None, f"shape {list(found.shape)}, golden {list(golden.shape)}"
    if not (np.issubdtype(found.dtype, np.integer) and np.issubdtype(golden.dtype, np.integer)):
        return Verdict.FAIL, None, f"dtype {found.dtype}, golden {golden.dtype}: expected integers"
    if not found.size:
        return Verdict.EMPTY, None, ""
    ours, theirs = np.sort(found, axis=-1), np.sort(golden, axis=-1)
    flipped = [tuple(int(i) for i in at) for at in np.argwhere((ours != theirs).any(axis=-1))]
    tokens = found.shape[0] * found.shape[1]
    margins = {at: _margin(ours[at], theirs[at], at, scores, visible) for at in flipped}
    noise = {at: _noise(ours[at], theirs[at], at, scores, tolerance) for at in flipped}
    failing = [at for at in flipped if not margins[at] <= noise[at]]
    worst = max(failing or flipped, key=lambda at: margins[at], default=())
    flips = Flips(
        tokens=len(flipped),
        of=tokens,
        ties=len(flipped) - len(failing),
        margin=margins[worst] if worst else 0.0,
        worst=worst,
    )
    if failing:
        return Verdict.FAIL, flips, f"{len(failing)} of {tokens} tokens choose otherwise, beyond any tie"
    if flipped:
        return Verdict.TIE, flips, f"{len(flipped)} of {tokens} tokens choose otherwise among equal scores"
    return Verdict.PASS, flips, ""


def _swapped(ours: Array, theirs: Array) -> tuple[Array, Array]:
    """Candidates that only we, and that only the golden has, duplicates counted."""
    mine, its = list(ours), list(theirs)
    for candidate in ours:
        if candidate in its:
            its.remove(candidate)
            mine.remove(candidate)
    return np.array(mine, dtype=np.int64), np.array(its, dtype=np.int64)


def _margin(ours: Array, theirs: Array, at: tuple[int, ...], scores: Array | None, visible: Array | None) -> float:
    """How much worse, by the golden's scores, our choice is; infinite where no score can excuse it."""
    mine, its = _swapped(ours, theirs)
    if scores is None or (mine < 0).any() or (its < 0).any():
        return float("inf")
    if (mine >= (scores.shape[-1] if visible is None else visible[at])).any():
        return float("inf")
    row = scores[at].astype(np.float64)
    return float(row[its].max() - row[mine].min())


def _noise(ours: Array, theirs: Array, at: tuple[int, ...], scores: Array | None, tolerance: Tolerance) -> float:
    if scores is None:
        return 0.0
    mine, its = _swapped(ours, theirs)
    both = np.concatenate([mine, its])
    both = both[(both >= 0) & (both < scores.shape[-1])]
    largest = float(np.abs(scores[at].astype(np.float64)[both]).max(initial=0.0))
    return 2 * (tolerance.atol + tolerance.rtol * largest)
