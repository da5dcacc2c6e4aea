"""Finds the part of a weight that differs from its published tensor, and what it looks like instead.

Weights are compared bit by bit in the dtype that the checkpoint stores, and described in the published orientation
``[out, in]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from dsv4_convert.spec import names
from dsv4_convert.weights.parameters import Parameters
from dsv4_convert.weights.published import PublishedWeights

Array = np.ndarray[Any, Any]
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightDifference:
    """One parameter, or one expert of a stack, that differs from the source. ``tensor`` is its published name."""

    path: str
    expert: int | None
    tensor: str
    what: str

    @property
    def sentence(self) -> str:
        """The finding in words."""
        where = self.path if self.expert is None else f"{self.path}, expert {self.expert}"
        return f"{where} is not {self.tensor} of the source: {self.what}"


def differing_weights(
    weights: Parameters, source: PublishedWeights, paths: Iterable[str]
) -> Iterator[WeightDifference]:
    """Every parameter of ``paths``, expert by expert, that differs from the source.

    Raises:
        BadInput: a weight cannot be read.
    """
    dtype = _BFLOAT16 if weights.metadata["storage"] == "bfloat16" else _FLOAT32
    for path in paths:
        rule, layer = names.located(source.config, path)
        experts = range(source.config.experts_of(layer)) if rule.per_expert else (None,)
        for expert in experts:
            ours, theirs = (_published(_read(side, path, expert, dtype), rule) for side in (weights, source))
            if _equal(ours, theirs):
                continue
            what = _elsewhere(ours, source, path, expert, dtype, rule) or describe(ours, theirs)
            yield WeightDifference(path=path, expert=expert, tensor=source.tensor(path, expert), what=what)


def describe(ours: Array, theirs: Array) -> str:
    """How ``ours`` differs from ``theirs``, which it is not equal to."""
    if ours.shape != theirs.shape:
        return f"shape {list(ours.shape)}, expected {list(theirs.shape)}"
    differs = ours.view(f"V{ours.dtype.itemsize}") != theirs.view(f"V{ours.dtype.itemsize}")
    extent = [
        f"{name} {_ranges(np.flatnonzero(differs.any(axis=tuple(a for a in range(differs.ndim) if a != axis))))}"
        for axis, name in zip(range(differs.ndim), ("rows", "columns", "axis 2"), strict=False)
    ]
    known = _rearranged(ours, theirs)
    count = f"{np.count_nonzero(differs):,} of {differs.size:,} elements differ, {', '.join(extent)}"
    return f"it is the source's {known} ({count})" if known else count


def _read(side: Parameters, path: str, expert: int | None, dtype: np.dtype[Any]) -> Array:
    return side.read(path, dtype) if expert is None else side.read_expert(path, expert, dtype)


def _published(array: Array, rule: names.Rule) -> Array:
    """From the model's layout to ``[out, in]``."""
    match rule.transform:
        case names.Transform.TRANSPOSE:
            array = array.T
        case names.Transform.GROUPED:
            array = array.transpose(0, 2, 1).reshape(-1, array.shape[1])
        case names.Transform.NONE:
            pass
    return np.ascontiguousarray(array)


def _equal(a: Array, b: Array) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def _elsewhere(
    ours: Array, source: PublishedWeights, path: str, expert: int | None, dtype: np.dtype[Any], rule: names.Rule
) -> str | None:
    """The other tensor of the same layer that these values belong to, if there is one."""
    if expert is not None:
        for other in range(source.config.experts_of(names.located(source.config, path)[1])):
            if other != expert and _equal(ours, _published(source.read_expert(path, other, dtype), rule)):
                return f"it holds expert {other}, {source.tensor(path, other)}"
    for other_path in source.alike(path):
        other_rule = source.config.names.rule_of(other_path)
        if other_rule.per_expert == rule.per_expert:
            theirs = _published(_read(source, other_path, expert, dtype), other_rule)
            if _equal(ours, theirs):
                return f"it holds {source.tensor(other_path, expert)}"
    return None


def _rearranged(ours: Array, theirs: Array) -> str | None:
    """A rearrangement of ``theirs`` that gives ``ours``, in words; None if none of the usual ones does."""
    if not ours.any():
        return "place, but all zero"
    if theirs.ndim == 2 and theirs.shape[0] == theirs.shape[1] and _equal(ours, np.ascontiguousarray(theirs.T)):
        return "transpose"
    for axis, name in zip(range(theirs.ndim), ("rows", "columns"), strict=False):
        if _equal(ours, np.ascontiguousarray(np.flip(theirs, axis))):
            return f"{name} in reverse order"
        size = theirs.shape[axis]
        for shift in sorted({1, size - 1, size // 2} - {0, size}):
            if _equal(ours, np.roll(theirs, shift, axis)):
                return f"{name} rolled by {shift}"
        if _same_vectors(ours, theirs, axis):
            return f"{name} in another order"
    quotient = np.divide(
        ours.astype(np.float64), theirs.astype(np.float64), out=np.full(ours.shape, np.nan), where=theirs != 0
    )
    factors = np.unique(quotient[~np.isnan(quotient)])
    return f"values times {factors[0]:g}" if len(factors) == 1 else None


def _same_vectors(ours: Array, theirs: Array, axis: int) -> bool:
    """Whether both have the same vectors along ``axis``, in any order."""

    def vectors(array: Array) -> list[bytes]:
        return sorted(vector.tobytes() for vector in np.moveaxis(array, axis, 0))

    return vectors(ours) == vectors(theirs)


def _ranges(indices: Array, *, limit: int = 4) -> str:
    """``0-3, 7``; the first few of many."""
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    runs = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in np.split(indices, breaks)]
    return ", ".join(runs[:limit]) + (f" and {len(runs) - limit} more" if len(runs) > limit else "")
