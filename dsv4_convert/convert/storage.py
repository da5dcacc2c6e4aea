"""How the parameters are stored: ``--dtype bfloat16 | float32 | source``, and what that means for each of them."""

from __future__ import annotations

import dataclasses
import math
from enum import StrEnum
from typing import Any

import ml_dtypes
import numpy as np

from dsv4_convert.checkpoint.dtypes import DTYPES
from dsv4_convert.coverage import Leaf, Source, Stored
from dsv4_convert.names import FP8_TILE, Transform

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


@dataclasses.dataclass(frozen=True)
class Piece:
    """One leaf of the store, made of one parameter of the model.

    ``part`` is None for a decoded parameter; under ``source`` storage ``"weight"`` or ``"scale"`` of a quantised one,
    or ``"whole"`` for one that is not quantised and copied as it is.
    """

    path: str
    leaf: Leaf
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    part: str | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the tensors that fill this leaf."""
        names = []
        for source in self.leaf.sources:
            if self.part != "scale":
                names.append(source.weight)
            if source.scale is not None and self.part != "weight":
                names.append(source.scale)
        return tuple(names)

    @property
    def nbytes(self) -> int:
        """Bytes in the store, uncompressed."""
        return math.prod(self.shape) * self.dtype.itemsize


def pieces(leaf: Leaf, storage: Storage, stored: dict[str, Stored], chunk_bytes: int = CHUNK_BYTES) -> list[Piece]:
    """The store's leaves for one parameter."""
    first: Source = leaf.sources[0]
    source = stored[first.weight]
    if storage is not Storage.SOURCE:
        dtype = storage.dtype if leaf.rule.kind.follows_dtype else DTYPES[source.dtype].array
        shape = leaf.target_shape
        return [Piece(leaf.path, leaf, dtype, shape, _chunks(leaf, dtype, chunk_bytes))]
    parts = [("weight", source)]
    if first.scale is not None:
        parts.append(("scale", stored[first.scale]))
    found = []
    for part, tensor in parts:
        shape, path = _as_stored(leaf, tensor), leaf.path
        if first.scale is None:
            part = "whole"
        else:
            path = f"{leaf.path}.{part}"
        chunk = (1, *shape[1:]) if leaf.rule.per_expert else shape
        found.append(Piece(path, leaf, DTYPES[tensor.dtype].array, shape, tuple(max(1, size) for size in chunk), part))
    return found


def _as_stored(leaf: Leaf, tensor: Stored) -> tuple[int, ...]:
    """Shape under ``source`` storage: as published, experts stacked."""
    if leaf.stacked:
        return (len(leaf.sources), *tensor.shape)
    if leaf.fused and leaf.rule.half is not None:
        return (tensor.shape[0], tensor.shape[1] // 2, tensor.shape[2])
    return tensor.shape


def _chunks(leaf: Leaf, dtype: np.dtype[Any], limit: int) -> tuple[int, ...]:
    """One chunk per expert; large matrices cut along the rows of their source, at whole FP8 tiles."""
    shape = leaf.target_shape
    if leaf.rule.per_expert:
        return (1, *shape[1:])
    if leaf.rule.transform is Transform.GROUPED or len(shape) < 2 or math.prod(shape) * dtype.itemsize <= limit:
        return shape
    rows, columns = leaf.source_shape
    tile = FP8_TILE[0]
    per_chunk = max(tile, limit // (columns * dtype.itemsize) // tile * tile)
    return (
        (columns, min(rows, per_chunk))
        if leaf.rule.transform is Transform.TRANSPOSE
        else (min(rows, per_chunk), columns)
    )
