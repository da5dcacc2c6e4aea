"""Making one chunk of a stored leaf out of the checkpoint's bytes."""

from __future__ import annotations

import math
import mmap
import threading
from contextlib import suppress
from typing import Any

import numpy as np

from dsv4_convert.checkpoint import Checkpoint
from dsv4_convert.checkpoint.weights import copy_rows, read_rows, read_table, read_weight
from dsv4_convert.convert.storage import Form, Part, StoredLeaf
from dsv4_convert.errors import BadInput
from dsv4_convert.formats.weight import decode_weight
from dsv4_convert.spec.coverage import Source
from dsv4_convert.spec.names import Kind

Array = np.ndarray[Any, Any]


class _Buffers(threading.local):
    """One reused buffer per thread: writing into memory that was touched before is several times faster.

    It begins at a page, which lets the store write it past the page cache. Huge pages save a fault for every 4 KiB.
    """

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array over the buffer; the next call on the same thread overwrites it."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._bytes.size < nbytes:
            self._bytes = np.empty(0, np.uint8)  # give the old one back first
            memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a kernel without huge pages
                    memory.madvise(mmap.MADV_HUGEPAGE)
            self._bytes = np.frombuffer(memory, np.uint8)
        return self._bytes[:nbytes].view(dtype).reshape(shape)


class ChunkMaker:
    """Gives the chunks of the store's leaves, decoded and laid out; safe to call from several threads."""

    def __init__(self, checkpoint: Checkpoint, *, experts: int) -> None:
        """``experts`` is how many of them a hash table may choose from."""
        self._checkpoint = checkpoint
        self._experts = experts
        self._buffers = _Buffers()

    def chunk(self, stored_leaf: StoredLeaf, index: tuple[int, ...]) -> Array:
        """Chunk ``index`` of ``stored_leaf``, C-contiguous; valid until the next call on the same thread.

        Raises:
            BadInput: the source cannot be read, or holds what is no number or no expert.
        """
        out = self._buffers.take(stored_leaf.layout.clipped_shape(index), stored_leaf.dtype)
        if stored_leaf.form is Form.ONES:
            out.fill(1)
            return out
        part = stored_leaf.part(index)
        if stored_leaf.form is Form.DECODED:
            self._decode(stored_leaf, part, out)
        else:
            self._copy(stored_leaf, part, out)
        self._release(part.source)
        return out

    def _decode(self, stored_leaf: StoredLeaf, part: Part, out: Array) -> None:
        rule = part.leaf.rule
        transpose = stored_leaf.transposed
        columns = math.prod(part.leaf.source_shape[1:])
        if len(part.leaf.source_shape) == 2:  # a chunk is one matrix, whatever the axes are that it is shown with
            out = out.reshape((columns, -1) if transpose else (-1, columns))
        else:
            out = out.reshape(-1)
        if part.expert is not None:
            plain = self._expert(stored_leaf, part.source.weight, part.expert)
            decode_weight(plain, None, dtype=stored_leaf.dtype, transpose=transpose, out=out)
        elif rule.kind is Kind.INTEGER:
            self._table(part, out)
        elif part.source.block is not None and (inside := part.rows.start % part.source.block[0]):
            # Rows that begin inside a tile, as no quantised tensor of a release has them: decode from its start.
            whole = slice(part.rows.start - inside, part.rows.stop)
            block = read_weight(self._checkpoint, part.source, dtype=stored_leaf.dtype, rows=whole)[inside:]
            np.copyto(out, block.T if transpose else block)
        else:
            read_weight(
                self._checkpoint, part.source, dtype=stored_leaf.dtype, rows=part.rows, transpose=transpose, out=out
            )

    def _table(self, part: Part, out: Array) -> None:
        """An index table, also for a model that wants floats. Raises :class:`BadInput` if one is not exact."""
        table = read_table(self._checkpoint, part.source.weight, self._experts, rows=part.rows).reshape(out.shape)
        np.copyto(out, table, casting="unsafe")
        if not np.array_equal(out, table):
            raise BadInput(
                f"{part.source.weight}: numbers up to {table.max()}, which {out.dtype} does not hold exactly; this is "
                "not an index table of DeepSeek-V4"
            )

    def _copy(self, stored_leaf: StoredLeaf, part: Part, out: Array) -> None:
        """The published bytes."""
        is_scale = stored_leaf.form is Form.SCALE
        name = part.source.scale if is_scale else part.source.weight
        assert name is not None
        if part.expert is not None:
            np.copyto(out, self._expert(stored_leaf, name, part.expert).reshape(out.shape))
            return
        rows = slice(None) if part.leaf.stacked else part.rows
        if part.leaf.rule.kind is Kind.INTEGER:
            np.copyto(out, read_table(self._checkpoint, name, self._experts, rows=rows).reshape(out.shape))
        else:
            copy_rows(self._checkpoint, name, out, is_scale=is_scale, start=rows.start or 0)

    def _expert(self, stored_leaf: StoredLeaf, name: str, expert: int) -> Array:
        """One expert of a fused tensor, or the gate (0) or up (1) half of its rows."""
        rows = read_rows(self._checkpoint, name, expert, expert + 1)[0]
        half = stored_leaf.leaf.rule.half
        if half is None:
            return rows
        middle = rows.shape[0] // 2
        return rows[:middle] if half == 0 else rows[middle:]

    def _release(self, source: Source) -> None:
        for name in source.names:
            self._checkpoint.release(name)
