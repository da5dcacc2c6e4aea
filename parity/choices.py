"""Comparing discrete choices: the experts of a token, the compressed entries of a query.

Choices are compared as sets, token by token. A difference is a *tie*, which either side's rounding may decide, when

* the golden's scores of the swapped candidates are closer than the noise of those scores, and
* our choice is the best by our own scores, where those are known.

Any other difference is a failure: no rounding explains it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv4_convert.parity.floor import Floor
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.tolerances import Limits

Array = np.ndarray[Any, Any]

#: A score that no other one beats.
_LARGEST = np.finfo(np.float32).max


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores behind a choice: the golden's ``[B, S, candidates]``, their noise floor, and our own.

    A compact golden does not hold all scores; then ``golden`` is None, and our own decide how close the candidates are.
    A token may choose from the first ``visible`` ``[B, S]`` candidates; None: from all. ``ours`` is None if only our
    choice is known.
    """

    golden: Array | None
    floor: Floor
    ours: Array | None = None
    visible: Array | None = None

    def of_blocks(self, size: int) -> Scores:
        """The scores of blocks of ``size`` candidates: that of the best visible one. No block beats the newest."""
        assert self.visible is not None
        visible = self.visible[..., None]

        def best(scores: Array | None) -> Array | None:
            if scores is None:
                return None
            padded = np.pad(scores, ((0, 0), (0, 0), (0, -scores.shape[2] % size)))
            seen = np.where(np.arange(padded.shape[2]) < visible, padded, -_LARGEST)
            blocks = seen.reshape(*scores.shape[:2], -1, size).max(axis=-1)
            return np.where(np.arange(blocks.shape[2]) == (visible - 1) // size, _LARGEST, blocks)

        return Scores(best(self.golden), self.floor, best(self.ours), -(-self.visible // size))

    def inside(self, blocks: Array, size: int) -> Scores:
        """The scores where only the candidates in some ``blocks`` ``[B, S, c]`` of ``size`` may be chosen."""

        def within(scores: Array | None) -> Array | None:
            if scores is None:
                return None
            of = np.arange(scores.shape[2]) // size
            return np.where((of == blocks[..., None]).any(axis=2), scores, -_LARGEST)

        return Scores(within(self.golden), self.floor, within(self.ours), self.visible)

    def at(self, rows: Sequence[int]) -> Scores:
        """The scores of some tokens."""
        picked = (None if part is None else part[:, rows] for part in (self.golden, self.ours, self.visible))
        golden, ours, visible = picked
        return Scores(golden, self.floor.at(rows), ours, visible)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flips:
    """``tokens`` of ``of`` tokens chose another set than the golden; ``ties`` of these are ties.

    ``worst``, ``(b, s)``, is the token whose swapped candidates are farthest apart in noise floors: among the failing
    tokens, or among the ties if none fails. ``margin`` is the distance there: the golden's score of its choice minus
    its score of ours (with a compact golden: our score of our choice minus our score of the golden's). ``noise`` is
    ``margin`` in noise floors of the scores. All are 0 without flips.
    """

    tokens: int
    of: int
    ties: int
    margin: float
    noise: float
    worst: tuple[int, ...]


def compare_choices(
    found: Array, golden: Array, scores: Scores | None, limits: Limits
) -> tuple[Verdict, Flips | None, str]:
    """Compare ``[B, S, k]`` indices, -1 for none. Without ``scores`` (hash routing) any difference is a failure."""
    if found.shape != golden.shape:
        return Verdict.FAIL, None, f"shape {list(found.shape)}, golden {list(golden.shape)}"
    if not (np.issubdtype(found.dtype, np.integer) and np.issubdtype(golden.dtype, np.integer)):
        return Verdict.FAIL, None, f"dtype {found.dtype}, golden {golden.dtype}: expected integers"
    if not found.size:
        return Verdict.EMPTY, None, ""
    ours, theirs = np.sort(found, axis=-1), np.sort(golden, axis=-1)
    flipped = [tuple(int(i) for i in at) for at in np.argwhere((ours != theirs).any(axis=-1))]
    tokens = found.shape[0] * found.shape[1]
    judged = {at: _judge(ours[at], theirs[at], at, scores) for at in flipped}
    failing = [at for at in flipped if not (judged[at].consistent and judged[at].noise <= limits.tie)]
    worst = max(failing or flipped, key=lambda at: judged[at].noise, default=())
    flips = Flips(
        tokens=len(flipped),
        of=tokens,
        ties=len(flipped) - len(failing),
        margin=judged[worst].margin if worst else 0.0,
        noise=judged[worst].noise if worst else 0.0,
        worst=worst,
    )
    if failing:
        if not any(judged[at].noise > limits.tie for at in failing):
            return Verdict.FAIL, flips, f"{len(failing)} of {tokens} tokens do not choose the best of their own scores"
        return Verdict.FAIL, flips, f"{len(failing)} of {tokens} tokens choose otherwise, beyond any tie"
    if flipped:
        return Verdict.TIE, flips, f"{len(flipped)} of {tokens} tokens choose otherwise among scores within their noise"
    return Verdict.PASS, flips, ""


@dataclasses.dataclass(frozen=True)
class _Flip:
    """One token: how much worse our choice is by the golden's scores, also in noise floors, and whether it is the best
    by our own scores."""

    margin: float
    noise: float
    consistent: bool


_INEXCUSABLE = _Flip(float("inf"), float("inf"), False)


def _judge(ours: Array, theirs: Array, at: tuple[int, ...], scores: Scores | None) -> _Flip:
    mine, its = _swapped(ours, theirs)
    if scores is None or (mine < 0).any() or (its < 0).any() or len(np.unique(ours)) < len(ours):
        return _INEXCUSABLE
    known = scores.ours if scores.golden is None else scores.golden
    if known is None:
        return _INEXCUSABLE
    visible = known.shape[-1] if scores.visible is None else int(scores.visible[at])
    if (mine >= visible).any():
        return _INEXCUSABLE
    row = known[at].astype(np.float64)
    # By the golden's scores ours is the worse choice, by our own the golden's is: as far apart as both sides' errors.
    better, worse = (its, mine) if scores.golden is not None else (mine, its)
    margin = float(row[better].max() - row[worse].min())
    floor = max(float(scores.floor.peak[at]), scores.floor.unit * float(np.abs(row[np.concatenate([mine, its])]).max()))
    noise = 0.0 if margin <= 0 else margin / floor if floor else float("inf")
    return _Flip(margin, noise, scores.ours is None or _best(ours, scores.ours[at][:visible]))


def _best(chosen: Array, row: Array) -> bool:
    """Whether no candidate that was left out scores higher than one that was chosen."""
    left_out = np.delete(row, chosen)
    return not left_out.size or bool(row[chosen].min() >= left_out.max())


def _swapped(ours: Array, theirs: Array) -> tuple[Array, Array]:
    """Candidates that only we, and that only the golden has, duplicates counted."""
    mine, its = list(ours), list(theirs)
    for candidate in ours:
        if candidate in its:
            its.remove(candidate)
            mine.remove(candidate)
    return np.array(mine, dtype=np.int64), np.array(its, dtype=np.int64)
