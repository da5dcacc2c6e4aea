"""One tensor of a checkpoint as numbers: a weight, decoded with its scales, or a table; what is none is refused."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

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
from dsv4_convert.spec.coverage import Source
from dsv4_convert.spec.v4.names import FP8_TILE

Array = np.ndarray[Any, Any]
_DAMAGED = (
    "no release of DeepSeek-V4 has that, so the file is damaged or was quantised wrongly: download it again, or ask "
    "whoever wrote it"
)
_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


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
    weight start at a multiple of 128. ``out`` is filled and returned where given.

    Raises:
        BadInput: scale and weight do not fit each other, or one of them holds what is no number
            (:mod:`dsv4_convert.formats.sound`).
    """
    stored = checkpoint.read(source.weight)
    first = rows.indices(stored.shape[0])[0] if stored.shape else 0
    if source.scale is None:
        stored = stored[rows] if stored.shape else stored
        _refuse(checkpoint, source.weight, plain_problem(stored, first_row=first))
        problem = narrowing_problem(stored, dtype=dtype, first_row=first)
        _refuse(checkpoint, source.weight, problem, "keep it with --dtype float32 or source")
        return decode_weight(stored, None, dtype=dtype, transpose=transpose, out=out)
    scale = checkpoint.read(source.scale)
    first_scale = first
    if stored.dtype == _FP8:
        start, stop, _ = rows.indices(stored.shape[0])
        if start % FP8_TILE[0]:
            raise ValueError(f"{source.weight}: rows from {start} would cut a tile of {FP8_TILE[0]} rows")
        first_scale = start // FP8_TILE[0]
        scale = scale[first_scale : -(-stop // FP8_TILE[0])]
    else:
        scale = scale[rows]
    codes = stored[rows]
    decoded = decode_weight(codes, scale, dtype=dtype, transpose=transpose, out=out)
    problem = decoded_problem(codes, scale, decoded, first_row=first, first_scale=first_scale, transposed=transpose)
    _refuse(checkpoint, source.weight, problem)
    return decoded


def read_published(checkpoint: Checkpoint, name: str, *, is_scale: bool, rows: slice = slice(None)) -> Array:
    """A stored tensor, or ``rows`` of it. Raises :class:`BadInput` if it holds an invalid number."""
    stored = checkpoint.read(name)
    if is_scale:
        _refuse(checkpoint, name, scale_problem(stored))
        return stored
    first = rows.indices(stored.shape[0])[0] if stored.shape else 0
    part = stored[rows] if stored.shape else stored
    problem = plain_problem(part, first_row=first) or code_problem(part, first_row=first)
    _refuse(checkpoint, name, problem)
    return part


def read_table(checkpoint: Checkpoint, name: str, experts: int, *, rows: slice = slice(None)) -> Array:
    """A stored table of experts, or ``rows`` of it. Raises :class:`BadInput` if an expert does not exist."""
    stored = checkpoint.read(name)
    table = stored[rows]
    _refuse(checkpoint, name, table_problem(table, experts, first_row=rows.indices(len(stored))[0]))
    return table


def _refuse(checkpoint: Checkpoint, name: str, problem: str | None, way_out: str = _DAMAGED) -> None:
    if problem is not None:
        raise BadInput(f"{checkpoint.tensors[name].file}: {name}: {problem}; {way_out}")
