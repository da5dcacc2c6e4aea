"""One tensor of a checkpoint as numbers: a weight, decoded with its scales, or a table; what is none is refused."""

from __future__ import annotations

from typing import Any

import numpy as np

from dsv4_convert.checkpoint.dtypes import array_shape
from dsv4_convert.checkpoint.folder import Checkpoint
from dsv4_convert.errors import BadInput
from dsv4_convert.formats.sound import (
    code_problem,
    decoded_problem,
    narrowing_problem,
    plain_problem,
    scale_problem,
    table_problem,
)
from dsv4_convert.formats.weight import decode_weight
from dsv4_convert.spec.coverage import Leaf, Source

Array = np.ndarray[Any, Any]
_DAMAGED = (
    "no release of DeepSeek-V4 has that, so the file is damaged or was quantised wrongly: download it again, or ask "
    "whoever wrote it"
)


def read_weight(
    checkpoint: Checkpoint,
    source: Source,
    *,
    dtype: np.dtype[Any],
    rows: slice = slice(None),
    transpose: bool = False,
    out: np.ndarray[Any, Any] | None = None,
) -> np.ndarray[Any, Any]:
    """Decode one source tensor, or ``rows`` of it, to ``dtype`` (bfloat16 or float32).

    The result is ``[out, in]`` or, transposed, ``[in, out]``; integer tensors keep their dtype. ``rows`` of an FP8
    weight start at a multiple of its tile. ``out`` is filled and returned where given.

    Raises:
        BadInput: scale and weight do not fit each other, or one of them holds what is no number
            (:mod:`dsv4_convert.formats.sound`).
    """
    stored = checkpoint.read(source.weight)
    first = rows.indices(stored.shape[0])[0] if stored.shape else 0
    if source.scale is None or source.block is None:
        stored = stored[rows] if stored.shape else stored
        _refuse_plain(checkpoint, source.weight, stored, dtype=dtype, first_row=first)
        return decode_weight(stored, None, dtype=dtype, transpose=transpose, out=out)
    scale = checkpoint.read(source.scale)
    height, (start, stop, _) = source.block[0], rows.indices(stored.shape[0])
    if start % height:
        raise ValueError(f"{source.weight}: rows from {start} would cut a tile of {height} rows")
    first_scale = start // height
    codes, scale = stored[rows], scale[first_scale : -(-stop // height)]
    decoded = decode_weight(codes, scale, dtype=dtype, block=source.block, transpose=transpose, out=out)
    problem = decoded_problem(codes, scale, decoded, first_row=first, first_scale=first_scale, transposed=transpose)
    _refuse(checkpoint, source.weight, problem)
    return decoded


def read_expert(
    checkpoint: Checkpoint,
    leaf: Leaf,
    expert: int,
    *,
    dtype: np.dtype[Any],
    transpose: bool = False,
    out: Array | None = None,
) -> Array:
    """Decode one matrix of a stack of experts, as :func:`read_weight` does, and give its pages back."""
    if leaf.fused:
        (source,) = leaf.sources
        count = leaf.source_shape[0]
        start = (leaf.rule.half or 0) * count
        stored = checkpoint.read(source.weight)[expert, start : start + count]
        _refuse_plain(checkpoint, source.weight, stored, dtype=dtype, first_row=start)
        decoded = decode_weight(stored, None, dtype=dtype, transpose=transpose, out=out)
    else:
        source = leaf.sources[expert]
        decoded = read_weight(checkpoint, source, dtype=dtype, transpose=transpose, out=out)
    release(checkpoint, source)
    return decoded


def release(checkpoint: Checkpoint, source: Source) -> None:
    """Give the mapped pages of a tensor and its scales back to the system."""
    for name in (source.weight, source.scale):
        if name is not None:
            checkpoint.release(name)


def read_rows(checkpoint: Checkpoint, name: str, start: int, stop: int) -> Array:
    """Rows of a stored weight as they are. Raises :class:`BadInput` if one holds an invalid number."""
    rows = checkpoint.read_rows(name, start, stop)
    _refuse_numbers(checkpoint, name, rows, is_scale=False, first_row=start)
    return rows


def copy_rows(checkpoint: Checkpoint, name: str, out: Array, *, is_scale: bool, start: int = 0) -> None:
    """Fill ``out`` with rows of a stored weight, or with its scales, from row ``start`` on.

    Raises:
        BadInput: one holds an invalid number.
    """
    info = checkpoint.tensors[name]
    checkpoint.read_into(name, out, start=start * (info.nbytes // info.shape[0]) if start else 0)
    rows = out.reshape(-1, *array_shape(info.dtype, info.shape)[1:]) if info.shape else out
    _refuse_numbers(checkpoint, name, rows, is_scale=is_scale, first_row=start)


def read_table(checkpoint: Checkpoint, name: str, experts: int, *, rows: slice = slice(None)) -> Array:
    """A stored table of experts, or ``rows`` of it. Raises :class:`BadInput` if an expert does not exist."""
    stored = checkpoint.read(name)
    table = stored[rows]
    _refuse(checkpoint, name, table_problem(table, experts, first_row=rows.indices(len(stored))[0]))
    return table


def _refuse_numbers(checkpoint: Checkpoint, name: str, rows: Array, *, is_scale: bool, first_row: int) -> None:
    if is_scale:
        problem = scale_problem(rows, first_row=first_row)
    else:
        problem = plain_problem(rows, first_row=first_row) or code_problem(rows, first_row=first_row)
    _refuse(checkpoint, name, problem)


def _refuse_plain(checkpoint: Checkpoint, name: str, stored: Array, *, dtype: np.dtype[Any], first_row: int) -> None:
    """Refuse what is no number, or too large for ``dtype``, in a weight without scales."""
    _refuse(checkpoint, name, plain_problem(stored, first_row=first_row))
    problem = narrowing_problem(stored, dtype=dtype, first_row=first_row)
    _refuse(checkpoint, name, problem, "keep it with --dtype float32 or source")


def _refuse(checkpoint: Checkpoint, name: str, problem: str | None, way_out: str = _DAMAGED) -> None:
    if problem is not None:
        raise BadInput(f"{checkpoint.tensors[name].file}: {name}: {problem}; {way_out}")
