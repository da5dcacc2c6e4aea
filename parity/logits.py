"""Comparing the logits as distributions over the vocabulary: what a difference does to the next token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from dsv4_convert.golden.archive import View

Array = np.ndarray[Any, Any]

#: Candidates that are compared as the "top k".
TOP = 5
#: Positions that are listed.
_WORST = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """One position ``(b, s)``: KL divergence in nats, and the most likely next token on either side.

    ``gap`` is the golden's logit of its first token minus that of ours: 0 where both agree.
    """

    at: tuple[int, int]
    token: int
    kl: float
    golden: int
    found: int
    gap: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitsComparison:
    """``kl``: KL(golden || found) in nats, mean and largest over positions. ``top1``: share of positions with the same
    most likely token. ``topk``: share of the golden's TOP tokens that are among ours. ``worst``: largest KL first."""

    positions: int
    kl_mean: float
    kl_max: float
    top1: float
    topk: float
    worst: tuple[Position, ...]


def compare_logits(found: Array, golden: View, tokens: Array) -> LogitsComparison | None:
    """Compare the logits ``[B, S, V]`` of the prompt ``tokens`` ``[B, S]`` with what a golden keeps of its own.

    Of a compact golden that is some positions; None where it keeps none. Computed in float64, row by row.
    """
    compared = every_position(found, golden, tokens)
    return None if compared is None else summary(*compared)


def every_position(found: Array, golden: View, tokens: Array) -> tuple[Sequence[Position], float] | None:
    """:func:`compare_logits` position by position, and the share of the golden's TOP tokens that are among ours."""
    rows = range(tokens.shape[1]) if golden.rows is None else golden.rows
    if golden.sketched is not None or not rows:
        return None
    positions = []
    overlap = 0
    k = min(TOP, found.shape[-1])
    for batch, (row, at) in product(range(len(tokens)), enumerate(rows)):
        ours, its = found[batch, at].astype(np.float64), golden.values[batch, row].astype(np.float64)
        p, q = _log_softmax(its), _log_softmax(ours)
        best, mine = int(its.argmax()), int(ours.argmax())
        positions.append(
            Position(
                at=(batch, at),
                token=int(tokens[batch, at]),
                # Rounding leaves tiny negative sums; a NaN stays one.
                kl=float(np.maximum(np.sum(np.exp(p) * (p - q)), 0.0)),
                golden=best,
                found=mine,
                gap=float(its[best] - its[mine]),
            )
        )
        overlap += len(np.intersect1d(np.argpartition(its, -k)[-k:], np.argpartition(ours, -k)[-k:]))
    return positions, overlap / (k * len(positions))


def summary(positions: Sequence[Position], topk: float) -> LogitsComparison:
    """What :func:`every_position` found, in a few numbers."""
    kl = np.array([position.kl for position in positions])
    order = sorted(positions, key=lambda position: -position.kl if position.kl == position.kl else -np.inf)
    return LogitsComparison(
        positions=len(positions),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        top1=float(np.mean([position.golden == position.found for position in positions])),
        topk=topk,
        worst=tuple(order[:_WORST]),
    )


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max()
    result: Array = shifted - np.log(np.sum(np.exp(shifted)))
    return result
