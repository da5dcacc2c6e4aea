"""One weight of a checkpoint, decoded: the stored bytes plus their scales as plain numbers."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from dsv4_convert.checkpoint.folder import Checkpoint
from dsv4_convert.coverage import Source
from dsv4_convert.formats.weight import decode_weight
from dsv4_convert.names import FP8_TILE

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
        BadInput: scale and weight do not fit each other.
    """
    stored = checkpoint.read(source.weight)
    if source.scale is None:
        return decode_weight(stored[rows], None, dtype=dtype, transpose=transpose, out=out)
    scale = checkpoint.read(source.scale)
    if stored.dtype == _FP8:
        start, stop, _ = rows.indices(stored.shape[0])
        if start % FP8_TILE[0]:
            raise ValueError(f"{source.weight}: rows from {start} would cut a tile of {FP8_TILE[0]} rows")
        scale = scale[start // FP8_TILE[0] : -(-stop // FP8_TILE[0])]
    else:
        scale = scale[rows]
    return decode_weight(stored[rows], scale, dtype=dtype, transpose=transpose, out=out)
