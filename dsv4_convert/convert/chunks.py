"""Making one chunk of a stored leaf out of the checkpoint's bytes."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

from dsv4_convert.checkpoint import Checkpoint
from dsv4_convert.checkpoint.weights import read_weight
from dsv4_convert.config import Config
from dsv4_convert.convert.storage import Piece
from dsv4_convert.coverage import Source
from dsv4_convert.formats.weight import decode_weight
from dsv4_convert.names import Transform

Array = np.ndarray[Any, Any]


class _Buffers(threading.local):
    """One reused buffer per thread: writing into memory that was touched before is several times faster."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array over the buffer; the next call on the same thread overwrites it."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._bytes.size < nbytes:
            self._bytes = np.empty(nbytes, np.uint8)
        return self._bytes[:nbytes].view(dtype).reshape(shape)


class ChunkMaker:
    """Gives the chunks of the store's leaves, decoded and laid out; safe to call from several threads."""

    def __init__(self, checkpoint: Checkpoint, config: Config) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._buffers = _Buffers()

    def chunk(self, piece: Piece, index: tuple[int, ...]) -> Array:
        """Chunk ``index`` of ``piece``, C-contiguous; valid until the next call on the same thread.

        Raises:
            BadInput: the source cannot be read.
        """
        return self._decoded(piece, index) if piece.part is None else self._verbatim(piece, index)

    def _decoded(self, piece: Piece, index: tuple[int, ...]) -> Array:
        leaf, rule = piece.leaf, piece.leaf.rule
        transpose = rule.transform is not Transform.NONE
        source = leaf.sources[index[0] if leaf.stacked else 0]
        if rule.per_expert:
            out = self._buffers.take((1, *piece.shape[1:]), piece.dtype)
            if leaf.fused:
                plain = _half(self._checkpoint.read(source.weight)[index[0]], rule.half)
                decode_weight(plain, None, dtype=piece.dtype, transpose=transpose, out=out[0])
            else:
                read_weight(self._checkpoint, source, dtype=piece.dtype, transpose=transpose, out=out[0])
        elif rule.transform is Transform.GROUPED:
            flat = read_weight(self._checkpoint, source, dtype=piece.dtype)
            out = self._buffers.take(piece.shape, piece.dtype)
            np.copyto(out, flat.reshape(self._config.o_groups, -1, flat.shape[1]).transpose(0, 2, 1))
        else:
            shape, rows = _rows_of_chunk(piece, index, axis=1 if transpose else 0)
            out = self._buffers.take(shape, piece.dtype)
            read_weight(self._checkpoint, source, dtype=piece.dtype, rows=rows, transpose=transpose, out=out)
        self._release(source)
        return out

    def _verbatim(self, piece: Piece, index: tuple[int, ...]) -> Array:
        """Published bytes as they are; a leaf that is not a stack of experts is one chunk."""
        leaf = piece.leaf
        source = leaf.sources[index[0] if leaf.stacked else 0]
        name = source.scale if piece.part == "scale" else source.weight
        assert name is not None
        stored = self._checkpoint.read(name)
        if leaf.fused:
            stored = _half(stored[index[0]], leaf.rule.half)
        if leaf.rule.per_expert:
            stored = stored[None]
        # Copied, so that the pages of the source can be given back before the chunk is hashed and written.
        out = self._buffers.take(stored.shape, stored.dtype)
        np.copyto(out, stored)
        self._release(source)
        return out

    def _release(self, source: Source) -> None:
        for name in (source.weight, source.scale):
            if name is not None:
                self._checkpoint.release(name)


def _rows_of_chunk(piece: Piece, index: tuple[int, ...], *, axis: int) -> tuple[tuple[int, ...], slice]:
    """Shape of a chunk that is cut along ``axis``, and the rows of the source that it holds."""
    if len(piece.shape) < 2:
        return piece.shape, slice(None)
    start = index[axis] * piece.chunk_shape[axis]
    stop = min(start + piece.chunk_shape[axis], piece.shape[axis])
    shape = list(piece.shape)
    shape[axis] = stop - start
    return tuple(shape), slice(start, stop)


def _half(rows: Array, half: int | None) -> Array:
    """The gate (0) or up (1) rows of one expert of a fused tensor; all rows for None."""
    if half is None:
        return rows
    middle = rows.shape[0] // 2
    return rows[:middle] if half == 0 else rows[middle:]
