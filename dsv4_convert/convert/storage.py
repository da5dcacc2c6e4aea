"""How the parameters are stored: ``--dtype bfloat16 | float32 | source``, and what that means for each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np

from dsv4_convert.checkpoint.dtypes import DTYPES
from dsv4_convert.spec.conversion import Storage
from dsv4_convert.spec.coverage import Leaf, Source, Stored
from dsv4_convert.spec.names import Transform
from dsv4_convert.store import ArrayLayout, LeafSpec

#: Bytes of one chunk, at most, where a leaf can be cut by rows of its source.
CHUNK_BYTES = 64 << 20

#: Rows that share no FP8 scale with the next ones, in any architecture.
_ROWS = 128


class Form(StrEnum):
    """The part of a parameter that a leaf of the store holds."""

    #: Numbers, in the model's orientation.
    DECODED = "decoded"
    #: The published bytes of a quantised weight, and of its scales.
    WEIGHT = "weight"
    SCALE = "scale"
    #: The published bytes of a tensor that is not quantised.
    WHOLE = "whole"
    #: Ones, which no tensor of the source gives.
    ONES = "ones"


@dataclasses.dataclass(frozen=True)
class Part:
    """The source of one chunk: rows of one source tensor, or of one expert of a fused tensor."""

    leaf: Leaf
    source: Source
    rows: slice
    expert: int | None = None


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """One leaf of the store. Every chunk of it is made of one source tensor and its scales.

    Attributes:
        path: dotted path in the store.
        leaves: the parameter of the model that it holds, or one per layer if layers are stacked; empty for ones.
        form: the part of the parameters that is stored.
        rows_per_chunk: rows of the source (of one expert, for a stack) that go into one chunk.
        first_row: first source row, for a leaf that holds only some rows.
        row_axis: the grid axis along which blocks of rows follow each other; None for a single block.
        layer_axis: the axis of the stacked layers; None for one layer.
        transposed: the leaf holds matrices as ``[in, out]``; published matrices are ``[out, in]``.
    """

    path: str
    leaves: tuple[Leaf, ...]
    form: Form
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    rows_per_chunk: int
    first_row: int = 0
    row_axis: int | None = None
    layer_axis: int | None = None
    transposed: bool = False

    @cached_property
    def layout(self) -> ArrayLayout:
        """Shape, dtype and chunk grid."""
        return ArrayLayout(shape=self.shape, dtype=self.dtype, chunk_shape=self.chunk_shape)

    @cached_property
    def spec(self) -> LeafSpec:
        """The leaf as the store knows it."""
        return LeafSpec(
            path=self.path,
            shape=self.shape,
            dtype=self.dtype,
            chunk_shape=self.chunk_shape,
            sources=self.sources,
            rule=self.rule_name,
        )

    @property
    def leaf(self) -> Leaf:
        """The parameter, or the first one: all have the same rule."""
        return self.leaves[0]

    @property
    def rule_name(self) -> str:
        """Name of its rule, for the manifest."""
        return self.leaf.rule.path if self.leaves else self.form.value

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the tensors that fill this leaf."""
        names = []
        for source in (source for leaf in self.leaves for source in leaf.sources):
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
        """The source of chunk ``index``; undefined for ones."""
        leaf = self.leaves[0 if self.layer_axis is None else index[self.layer_axis]]
        at = 0 if self.row_axis is None else index[self.row_axis]
        start = self.first_row + at * self.rows_per_chunk
        rows = slice(start, start + self.rows_per_chunk)
        if not leaf.rule.per_expert:
            return Part(leaf, leaf.sources[0], rows)
        return Part(leaf, leaf.sources[0], rows, index[0]) if leaf.fused else Part(leaf, leaf.sources[index[0]], rows)


def stored_leaves(
    leaf: Leaf, storage: Storage, stored: Mapping[str, Stored], chunk_bytes: int = CHUNK_BYTES
) -> list[StoredLeaf]:
    """The store's leaves for one parameter."""
    first = leaf.sources[0]
    if storage is not Storage.SOURCE:
        return [_decoded(leaf, decoded_dtype(leaf, storage, stored), chunk_bytes)]
    if first.scale is None:
        return [_published(leaf, Form.WHOLE, leaf.path, stored[first.weight], chunk_bytes)]
    return [
        _published(leaf, Form.WEIGHT, f"{leaf.path}.weight", stored[first.weight], chunk_bytes),
        _published(leaf, Form.SCALE, f"{leaf.path}.scale", stored[first.scale], chunk_bytes),
    ]


def decoded_dtype(leaf: Leaf, storage: Storage, stored: Mapping[str, Stored]) -> np.dtype[Any]:
    """The dtype of a decoded parameter: the storage's, or the source's if the rule keeps it."""
    follows = leaf.rule.kind.follows_dtype
    return storage.dtype if follows else DTYPES[stored[leaf.sources[0].weight].dtype].array


def _decoded(leaf: Leaf, dtype: np.dtype[Any], limit: int) -> StoredLeaf:
    """One chunk per expert and per output group; other matrices are cut along the rows of their source."""
    shape, rows = leaf.target_shape, leaf.source_shape[0]
    stored_leaf = StoredLeaf(
        leaf.path, (leaf,), Form.DECODED, dtype, shape, shape, rows, transposed=is_transposed(leaf)
    )
    if leaf.rule.per_expert:
        return dataclasses.replace(stored_leaf, chunk_shape=(1, *shape[1:]))
    if leaf.rule.transform is Transform.GROUPED:
        return dataclasses.replace(stored_leaf, chunk_shape=(1, *shape[1:]), rows_per_chunk=shape[2], row_axis=0)
    if len(shape) != 2:
        return stored_leaf
    rows = _rows_per_chunk(leaf.source_shape, dtype, limit)
    chunk = (shape[0], rows) if stored_leaf.transposed else (rows, shape[1])
    return dataclasses.replace(
        stored_leaf, chunk_shape=chunk, rows_per_chunk=rows, row_axis=1 if stored_leaf.transposed else 0
    )


def is_transposed(leaf: Leaf) -> bool:
    """Whether the model has the matrix as ``[in, out]``."""
    return leaf.rule.transform is not Transform.NONE


def _published(leaf: Leaf, form: Form, path: str, tensor: Stored, limit: int) -> StoredLeaf:
    """As published, experts stacked; one chunk per expert, large matrices cut by rows."""
    shape, dtype = tensor.shape, DTYPES[tensor.dtype].array
    if leaf.rule.per_expert:
        shape = (shape[0], leaf.source_shape[0], shape[2]) if leaf.fused else (len(leaf.sources), *shape)
        return StoredLeaf(path, (leaf,), form, dtype, shape, _at_least_one((1, *shape[1:])), shape[1])
    cut = len(shape) == 2
    rows = _rows_per_chunk(shape, dtype, limit) if cut else (shape or (1,))[0]
    chunk = (rows, *shape[1:]) if shape else ()
    return StoredLeaf(path, (leaf,), form, dtype, shape, _at_least_one(chunk), rows, row_axis=0 if shape else None)


def _rows_per_chunk(shape: tuple[int, ...], dtype: np.dtype[Any], limit: int) -> int:
    """The largest number of rows within the limit: all rows, or a multiple of those of every FP8 tile."""
    rows, columns = shape
    if rows * columns * dtype.itemsize <= limit:
        return rows
    return min(rows, max(_ROWS, limit // (columns * dtype.itemsize) // _ROWS * _ROWS))


def _at_least_one(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(1, size) for size in shape)
