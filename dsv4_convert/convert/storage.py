"""How the parameters are stored: ``--dtype bfloat16 | float32 | source``, and what that means for each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import StrEnum
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from dsv4_convert.checkpoint.dtypes import DTYPES
from dsv4_convert.config import Config
from dsv4_convert.coverage import Leaf, Source, Stored
from dsv4_convert.names import FP8_TILE, Transform
from dsv4_convert.store import ArrayLayout

#: Bytes of one chunk, at most, where a leaf can be cut by rows of its source.
CHUNK_BYTES = 64 << 20


class Storage(StrEnum):
    """What ``--dtype`` may say."""

    #: Half the size of float32, and exact for FP4 and FP8 weights with power-of-two scales.
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    #: The published bytes and scales as they are, in the published orientation: leaves ``.weight`` and ``.scale``.
    SOURCE = "source"

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of converted weights; not defined for ``source``."""
        return {Storage.BFLOAT16: np.dtype(ml_dtypes.bfloat16), Storage.FLOAT32: np.dtype(np.float32)}[self]


class Form(StrEnum):
    """What a leaf of the store holds of its parameter."""

    #: Numbers, in the model's orientation.
    DECODED = "decoded"
    #: The published bytes of a quantised weight, and of its scales.
    WEIGHT = "weight"
    SCALE = "scale"
    #: The published bytes of a tensor that is not quantised.
    WHOLE = "whole"


@dataclasses.dataclass(frozen=True)
class Part:
    """What one chunk is made of: rows of one source tensor, or of one expert of a fused one."""

    source: Source
    rows: slice
    expert: int | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """One leaf of the store, made of one parameter of the model.

    Attributes:
        path: dotted path in the store.
        leaf: the parameter.
        form: what of it is stored.
        rows_per_chunk: rows of the source (of one expert, of a stack) that go into one chunk.
        row_axis: the axis of the store's grid along which those runs of rows follow each other.
    """

    path: str
    leaf: Leaf
    form: Form
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    rows_per_chunk: int
    row_axis: int = 0

    @cached_property
    def layout(self) -> ArrayLayout:
        """Shape, dtype and chunk grid."""
        return ArrayLayout(shape=self.shape, dtype=self.dtype, chunk_shape=self.chunk_shape)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the tensors that fill this leaf."""
        names = []
        for source in self.leaf.sources:
            if self.form is not Form.SCALE:
                names.append(source.weight)
            if source.scale is not None and self.form is not Form.WEIGHT:
                names.append(source.scale)
        return tuple(names)

    @property
    def nbytes(self) -> int:
        """Bytes in the store, uncompressed."""
        return self.layout.nbytes

    def part(self, index: tuple[int, ...]) -> Part:
        """What chunk ``index`` is made of."""
        leaf = self.leaf
        if leaf.rule.per_expert:
            expert = index[0]
            rows = slice(0, leaf.source_shape[0])
            return Part(leaf.sources[0], rows, expert) if leaf.fused else Part(leaf.sources[expert], rows)
        at = index[self.row_axis] if index else 0
        rows = slice(at * self.rows_per_chunk, (at + 1) * self.rows_per_chunk)
        return Part(leaf.sources[0], rows)


def pieces(
    leaf: Leaf, storage: Storage, stored: Mapping[str, Stored], config: Config, chunk_bytes: int = CHUNK_BYTES
) -> list[Piece]:
    """The store's leaves for one parameter."""
    first = leaf.sources[0]
    if storage is not Storage.SOURCE:
        dtype = storage.dtype if leaf.rule.kind.follows_dtype else DTYPES[stored[first.weight].dtype].array
        return [_decoded(leaf, dtype, config, chunk_bytes)]
    if first.scale is None:
        return [_published(leaf, Form.WHOLE, leaf.path, stored[first.weight], chunk_bytes)]
    return [
        _published(leaf, Form.WEIGHT, f"{leaf.path}.weight", stored[first.weight], chunk_bytes),
        _published(leaf, Form.SCALE, f"{leaf.path}.scale", stored[first.scale], chunk_bytes),
    ]


def _decoded(leaf: Leaf, dtype: np.dtype[Any], config: Config, limit: int) -> Piece:
    """One chunk per expert and per output group; other matrices are cut along the rows of their source."""
    shape, rows = leaf.target_shape, leaf.source_shape[0]
    row_axis = 0
    if leaf.rule.per_expert:
        chunk = (1, *shape[1:])
    elif leaf.rule.transform is Transform.GROUPED:
        chunk, rows = (1, *shape[1:]), shape[2]
    elif len(shape) == 2:
        rows = _rows_per_chunk(leaf.source_shape, dtype, limit)
        row_axis = 1 if leaf.rule.transform is Transform.TRANSPOSE else 0
        chunk = (shape[0], rows) if row_axis else (rows, shape[1])
    else:
        chunk = shape
    return Piece(leaf.path, leaf, Form.DECODED, dtype, shape, chunk, rows, row_axis)


def _published(leaf: Leaf, form: Form, path: str, tensor: Stored, limit: int) -> Piece:
    """As published, experts stacked; one chunk per expert, large matrices cut by rows."""
    shape, dtype = tensor.shape, DTYPES[tensor.dtype].array
    if leaf.rule.per_expert:
        shape = (shape[0], leaf.source_shape[0], shape[2]) if leaf.fused else (len(leaf.sources), *shape)
        return Piece(path, leaf, form, dtype, shape, _at_least_one((1, *shape[1:])), shape[1])
    cut = len(shape) == 2 and form is not Form.SCALE  # scales are small
    rows = _rows_per_chunk(shape, dtype, limit) if cut else (shape or (1,))[0]
    chunk = (rows, *shape[1:]) if shape else ()
    return Piece(path, leaf, form, dtype, shape, _at_least_one(chunk), rows)


def _rows_per_chunk(shape: tuple[int, ...], dtype: np.dtype[Any], limit: int) -> int:
    """As many rows as fit the limit, in whole FP8 tiles; all of them where they fit."""
    rows, columns = shape
    if rows * columns * dtype.itemsize <= limit:
        return rows
    tile = FP8_TILE[0]
    return min(rows, max(tile, limit // (columns * dtype.itemsize) // tile * tile))


def _at_least_one(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(1, size) for size in shape)
