"""The interface that reads a model's parameters one at a time, and helpers of its implementations.

These are a converted checkpoint (:mod:`dsv4_convert.weights.converted`) and the published shards
(:mod:`dsv4_convert.weights.published`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from dsv4_convert.formats.checks import empty_aligned
from dsv4_convert.formats.weight import StoredMatrix, decode_weight
from dsv4_convert.spec import names
from dsv4_convert.spec.config import Config
from dsv4_convert.store.layout import Region

Array = np.ndarray[Any, Any]
FLOAT32 = np.dtype(np.float32)


class Parameters(Protocol):
    """Reads a model's parameters one at a time, from a converted checkpoint or the published shards."""

    @property
    def config(self) -> Config:
        """The architecture."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Facts about the weights for reports; at least ``source`` and ``storage``."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers and stages that are there, ascending."""

    def check_layers(self, wanted: tuple[int, ...]) -> None:
        """Raises :class:`UsageError` for missing layers."""

    def read(self, path: str, dtype: np.dtype[Any] = ...) -> Array:
        """One parameter in the model's layout."""

    def read_expert(self, path: str, expert: int, dtype: np.dtype[Any] = ...) -> Array:
        """One matrix of a stack of experts."""

    def read_rows(self, path: str, rows: Array, dtype: np.dtype[Any] = ...) -> Array:
        """Some rows of a table that is looked up: no more than these are read."""

    def read_region(self, path: str, region: Region, dtype: np.dtype[Any] = ...) -> Array:
        """A part of one parameter: one slice of step 1 for every axis of the model's layout."""

    def matrix(self, path: str, at: int | None) -> StoredMatrix:
        """A matrix as it is stored; of a stack of experts or groups, entry ``at``."""

    def token_map(self) -> Array:
        """The mapped id of every token, for the engrams (:func:`dsv4_convert.weights.token_map.token_map`)."""

    def damaged(self, path: str) -> bool:
        """Whether a parameter is known to differ from what was written."""


class StoredParameters(Parameters, Protocol):
    """Parameters of a checkpoint, with what it stores for each."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The parameters that are there."""

    def shape(self, path: str) -> tuple[int, ...]:
        """Shape of a parameter in the model's layout."""

    def read_stored(self, path: str, region: Region) -> tuple[Array, ...]:
        """The weights, and the scales where there are some, that a region is decoded from, as they are stored.

        The region has one entry of a stack. Axes are those of the model's layout, and tiles are whole.
        """


class Whole(Parameters, Protocol):
    """Parameters of a whole checkpoint, which may have draft stages."""

    def check_stages(self) -> None:
        """Raises :class:`UsageError` if there is no draft stage, with the reason."""


def assembled(
    region: Region,
    rule: names.Rule,
    dtype: np.dtype[Any],
    matrix: Callable[[int | None], StoredMatrix],
    plain: Callable[[Region], Array],
) -> Array:
    """Read a region of a parameter; every slice has a start and a stop.

    Args:
        region: a region in the model's layout.
        rule: the parameter's row in the names table.
        dtype: dtype of weights.
        matrix: returns the stored parameter; for a stack of matrices, one entry of its first axis.
        plain: reads a region of a vector or an integer table.
    """
    out = empty_aligned(tuple(part.stop - part.start for part in region), dtype_of(rule, dtype))
    if rule.kind is names.Kind.INTEGER:
        out[...] = plain(region)
    elif len(region) == 1:
        out[...] = decode_weight(plain(region), None, dtype=out.dtype)
    elif len(region) == 2:
        matrix(None).fill(out, region)
    else:
        for to, at in enumerate(range(region[0].start, region[0].stop)):
            matrix(at).fill(out[to], region[1:])
    return out


def stored_parts(
    region: Region,
    rule: names.Rule,
    matrix: Callable[[int | None], StoredMatrix],
    plain: Callable[[Region], Array],
) -> tuple[Array, ...]:
    """The stored arrays that :func:`assembled` decodes a region from; of a stack, the region has one entry."""
    if rule.kind is names.Kind.INTEGER or len(region) == 1:
        return (plain(region),)
    return matrix(region[0].start if len(region) > 2 else None).stored(region[-2:])


def dtype_of(rule: names.Rule, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of a parameter in a model whose weights are ``dtype``."""
    if rule.kind is names.Kind.INTEGER:
        return np.dtype(np.int32)
    return dtype if rule.kind.follows_dtype else FLOAT32


def stacked(count: int, read: Callable[[int], Array]) -> Array:
    """The matrices that ``read`` gives, ``[E, …]``. Beside the stack, one matrix is in memory."""
    first = read(0)
    stack = empty_aligned((count, *first.shape), first.dtype)
    stack[0] = first
    for at in range(1, count):
        stack[at] = read(at)
    return stack


def grouped(matrix: Array, groups: int) -> Array:
    """The published ``[groups * out, in]`` of a block-diagonal matrix as ``[groups, in, out]``."""
    return np.ascontiguousarray(matrix.reshape(groups, -1, matrix.shape[1]).transpose(0, 2, 1))
