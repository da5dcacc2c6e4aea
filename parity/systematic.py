"""Systematic error: what the errors of many elements have in common, however small each of them is.

A limit on the size of an error cannot see a fault that moves every element by less than rounding does. But rounding is
independent and a fault is not: what N independent errors have in common falls with the square root of N. So the errors
of a tap are correlated with what a fault follows, its *trend*:

* slope: the golden itself. The regression of found on golden has a slope other than 1, as after a wrong scale.
* offset: 1. The same is added to every element.
* either of them by position: growing with the row's place in the prompt.
* bias: of pooled entries, what a larger position bias of their compressor does (:func:`along_bias`).

The first four are measured over the whole tap, in each head, group or stream, in each channel, and for the routed
experts over the tokens of each expert. Error and golden are divided by the rms of the golden's row, so that all rows
count alike.

The correlation of errors ``e`` with a trend ``u`` is ``|sum(e u)| / sqrt(sum(u^2) max(sum(e^2), N least^2))``, where
``least`` keeps errors far below the rounding of the dtype from counting.
:data:`dsv4_convert.parity.tolerances.SYSTEMATIC` says how much of it independent rounding allows.
"""

from __future__ import annotations

import dataclasses
import math
from enum import StrEnum
from typing import Any

import numpy as np

from dsv4_convert.parity.tolerances import SYSTEMATIC

Array = np.ndarray[Any, Any]

#: Names of the parts of a tap, by the shape letter of their axis.
_PARTS = {"H": "head", "Hi": "head", "G": "group", "N": "stream"}


class Trend(StrEnum):
    """What errors follow."""

    SLOPE = "slope"
    SLOPE_BY_POSITION = "slope by position"
    OFFSET = "offset"
    OFFSET_BY_POSITION = "offset by position"
    BIAS = "position bias"


#: The trends that any tap may have.
_OF_ANY_TAP = tuple(trend for trend in Trend if trend is not Trend.BIAS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Systematic:
    """The part of a tap whose errors have most in common, compared with what is allowed.

    ``part``: the part in words, such as ``head 3`` or ``expert 7``; empty for the whole tap. ``size``: by how much its
    elements are too large, as a share of themselves for a slope, and of the rms of their row for an offset; by
    position: how much more in the last row than in the first. For a bias, by how much the bias is too large.
    ``correlation``: of errors and trend, from 0 to 1. ``allowed``: the largest correlation that independent rounding
    explains.
    """

    trend: Trend
    part: str
    size: float
    correlation: float
    allowed: float

    @property
    def share(self) -> float:
        """The correlation as a share of what is allowed."""
        return self.correlation / self.allowed

    @property
    def reason(self) -> str:
        """Why it fails, or does not."""
        return f"its errors share one trend: a correlation of {self.correlation:.2f}, {self.allowed:.2f} allowed"

    def describe(self, tap: str) -> str:
        """The trend in words; ``tap`` is its full name."""
        size = f"{abs(self.size):.2g} times" if abs(self.size) > 1 else f"{abs(self.size) * 100:.2g} %"
        direction = "large" if self.size > 0 else "small"
        if self.trend is Trend.BIAS:
            return f"The errors of {tap} are those of a position bias (ape) that is {size} too {direction}."
        what = "The output" if self.part.startswith("expert") else "Every element"
        whose = f"{self.part} of {tap}" if self.part else tap
        of = " of its row's rms" if self.trend in (Trend.OFFSET, Trend.OFFSET_BY_POSITION) else ""
        more = "" if self.trend in (Trend.SLOPE, Trend.OFFSET) else " in the last row, compared with the first"
        return f"{what} of {whose} is {size}{of} too {direction}{more}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Independence:
    """Which errors of a tap are independent.

    ``tokens`` ``[B, S]``: the token of each row, the last one of a block for a compressed entry. Rows of equal tokens
    may have equal errors. ``width``: the number of values that the operation takes for a row, through which all errors
    of the row come; 1 where they may come from one error before the operation, None where each element has its own.
    ``rounded_weights``: whether weights of the operation may be rounded. The weights of a tile have few mantissas, so
    what rounding does to them may have one sign.
    """

    tokens: Array
    width: int | None
    rounded_weights: bool


@dataclasses.dataclass(frozen=True)
class ExpertShares:
    """The experts of every row, and their weights: both ``[B, S, K]``."""

    experts: Array
    weights: Array


def systematic(
    found: Array,
    golden: Array,
    sizes: Array,
    letters: tuple[str, ...],
    independent: Independence,
    routing: ExpertShares | None = None,
    along: Array | None = None,
) -> Systematic | None:
    """The trend that is farthest beyond what independent rounding allows, or nearest to it.

    Args:
        found: the tap ``[B, S, ...]``, or the projections of its sketch.
        golden: the golden's.
        sizes: the rms of the golden's rows ``[B, S]``.
        letters: the tap's shape letters after the first two; none for a sketch, which has no parts.
        independent: which of its errors are independent.
        routing: for the sum of the routed experts.
        along: for pooled entries, of :func:`along_bias`, in the golden's shape.

    Returns:
        None for a tap without elements, or with some that are not finite.
    """
    if not (golden.size and np.isfinite(found).all() and np.isfinite(golden).all()):
        return None
    rows = _Rows.of(found, golden, sizes, independent)
    measured = _trends(rows, golden.shape[2:], letters)
    if routing is not None:
        measured += _of_experts(rows, routing)
    if along is not None:
        measured.append(_of_bias(rows, along))
    return max(measured, key=lambda one: one.share)


def along_bias(values: Array, gates: Array, bias: Array, entry: int) -> Array:
    """How pooled entries move with the size of their position bias: the derivative by its logarithm.

    Entry ``b`` is ``sum_j p_j v_j`` with the shares ``p = softmax_j(z_j + a_j)`` of gates ``z`` and bias ``a``. Its
    derivative is ``sum_j p_j (a_j - sum_k p_k a_k) v_j``.

    Args:
        values: ``[B, S, W]``, of whole blocks and a rest.
        gates: ``[B, S, W]``, before the bias.
        bias: ``[r, W]``, for blocks of ``r`` tokens.
        entry: channels of an entry ``C``; where ``W`` is ``2 C``, a block's first channels belong to the next entry.

    Returns:
        ``[B, T, C]`` in float64, for ``T`` whole blocks.
    """
    ratio = len(bias)
    blocks = values.shape[1] // ratio

    def blocked(rows: Array, absent: float) -> Array:
        """``[B, T, rows of an entry, C]``; ``absent`` stands for the block before the first."""
        parts = rows[:, : blocks * ratio].astype(np.float64).reshape(len(rows), blocks, ratio, -1)
        if parts.shape[-1] == entry:
            return parts
        for_next, own = np.split(parts, 2, axis=-1)
        before = np.concatenate([np.full_like(for_next[:, :1], absent), for_next[:, :-1]], axis=1)
        return np.concatenate([before, own], axis=2)

    tiled = np.broadcast_to(np.tile(bias, (blocks, 1)), (len(values), blocks * ratio, bias.shape[1]))
    terms, added = blocked(values, 0.0), blocked(tiled, 0.0)
    logits = blocked(gates, -np.inf) + added
    shares = np.exp(logits - logits.max(axis=2, keepdims=True))
    shares /= shares.sum(axis=2, keepdims=True)
    mean = np.sum(shares * added, axis=2, keepdims=True)
    derivative: Array = np.sum(shares * (added - mean) * terms, axis=2)
    return derivative


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Error and golden ``[R, elements]`` over the rms of the golden's row, and the rows' positions from -1/2 to 1/2.

    ``scale`` ``[R, 1]``: one over that rms.
    """

    error: Array
    golden: Array
    scale: Array
    position: Array
    independent: Independence

    @classmethod
    def of(cls, found: Array, golden: Array, sizes: Array, independent: Independence) -> _Rows:
        batch, length = sizes.shape
        scale = np.divide(1, sizes, out=np.zeros(sizes.shape), where=sizes > 0).reshape(-1, 1)
        expected = golden.reshape(batch * length, -1).astype(np.float64)
        error = (found.reshape(expected.shape) - expected) * scale
        expected *= scale
        position = np.tile(np.linspace(-0.5, 0.5, length) if length > 1 else np.zeros(1), batch)
        return cls(error, expected, scale, position, independent)

    def allowed(self, rows: Array | slice, elements: int) -> float:
        """The largest correlation that passes, of so many elements in each of some rows."""
        distinct = len(np.unique(self.independent.tokens.reshape(-1)[rows]))
        return SYSTEMATIC.allowed(distinct * min(elements, self.independent.width or elements))

    def correlation(self, product: Array, square: Array, error: Array, elements: int) -> tuple[Array, Array]:
        """Sizes of trends, and their correlations with the errors of so many elements; 0 for those that do not count.

        ``product``: sums of error times trend; ``square`` and ``error``: of their squares.
        """
        size = np.divide(product, square, out=np.zeros_like(product), where=square > 0)
        spread = np.sqrt(square * np.maximum(error, elements * SYSTEMATIC.least**2))
        least = SYSTEMATIC.rounded_weights if self.independent.rounded_weights else 0.0
        counts = (spread > 0) & (np.abs(size) >= least)
        return size, np.divide(np.abs(product), spread, out=np.zeros_like(spread), where=counts)


def _trends(rows: _Rows, shape: tuple[int, ...], letters: tuple[str, ...]) -> list[Systematic]:
    """The worst trend of the tap as a whole, of its heads and of its channels."""
    weights = np.stack([np.ones_like(rows.position), rows.position])
    # Sums over the rows for each channel, in the order of the trends. A head's sums are sums over its channels.
    products = np.concatenate([weights @ (rows.error * rows.golden), weights @ rows.error])
    offsets = np.broadcast_to(np.sum(weights**2, axis=1, keepdims=True), (2, rows.golden.shape[1]))
    squares = np.concatenate([weights**2 @ rows.golden**2, offsets])
    errors = np.sum(rows.error**2, axis=0)
    parts: list[tuple[int, ...]] = [()]
    if len(letters) > 1:
        parts.append(shape[:1])
    if letters and letters[-1] != "T":  # what a compressed entry adds to the scores of all queries is one error
        parts.append(shape)
    return [_worst(rows, part, letters, products, squares, errors) for part in parts]


def _worst(
    rows: _Rows, part: tuple[int, ...], letters: tuple[str, ...], products: Array, squares: Array, errors: Array
) -> Systematic:
    """The largest correlation among the parts of a tap that the axes ``part`` count."""
    count = math.prod(part)
    elements = len(errors) // count
    product, square = (np.sum(sums.reshape(len(_OF_ANY_TAP), count, elements), axis=-1) for sums in (products, squares))
    error = np.sum(errors.reshape(count, elements), axis=-1)
    size, correlation = rows.correlation(product, square, error, len(rows.error) * elements)
    trend, at = np.unravel_index(int(np.argmax(correlation)), correlation.shape)
    names = (*letters[: len(part) - 1], "channel") if len(part) == len(letters) else letters[: len(part)]
    words = (f"{_PARTS.get(name, name)} {at}" for name, at in zip(names, np.unravel_index(at, part), strict=True))
    return Systematic(
        trend=_OF_ANY_TAP[trend],
        part=", ".join(words) if part else "",
        size=float(size[trend, at]),
        correlation=float(correlation[trend, at]),
        allowed=rows.allowed(slice(None), elements),
    )


def _of_experts(rows: _Rows, routing: ExpertShares) -> list[Systematic]:
    """The slope of each routed expert's output, over the rows that it was chosen for.

    An expert's own part of a row is not known; on average it is as large as its share of the squared weights.
    """
    experts, weights = (part.reshape(len(rows.error), -1) for part in (routing.experts, routing.weights))
    shares = np.square(weights, dtype=np.float64)
    shares /= np.sum(shares, axis=1, keepdims=True)
    width = rows.error.shape[1]
    product, square, error = (
        np.sum(one * other, axis=1)
        for one, other in ((rows.error, rows.golden), (rows.golden, rows.golden), (rows.error, rows.error))
    )
    measured = []
    for expert in np.unique(experts):
        at, place = np.nonzero(experts == expert)
        share = shares[at, place]
        along, trend = (np.sum(part, keepdims=True) for part in (share * product[at], share**2 * square[at]))
        size, correlation = rows.correlation(along, trend, np.sum(error[at], keepdims=True), len(at) * width)
        measured.append(
            Systematic(
                trend=Trend.SLOPE,
                part=f"expert {expert}",
                size=float(size[0]),
                correlation=float(correlation[0]),
                allowed=rows.allowed(at, width),
            )
        )
    return measured


def _of_bias(rows: _Rows, along: Array) -> Systematic:
    """The trend of pooled entries along their position bias."""
    trend = along.reshape(rows.error.shape) * rows.scale
    along_it, square, error = (
        np.sum(part, keepdims=True).reshape(1) for part in (rows.error * trend, trend**2, rows.error**2)
    )
    size, correlation = rows.correlation(along_it, square, error, trend.size)
    return Systematic(
        trend=Trend.BIAS,
        part="",
        size=float(size[0]),
        correlation=float(correlation[0]),
        allowed=rows.allowed(slice(None), trend.shape[1]),
    )
