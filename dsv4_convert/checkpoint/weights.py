"""One weight of a checkpoint, decoded: the stored bytes plus their scales as plain numbers."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from dsv4_convert import formats
from dsv4_convert.checkpoint.folder import Checkpoint
from dsv4_convert.names import Source

_PACKED_FP4 = (np.dtype(np.int8), np.dtype(np.uint8))
_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


def read_weight(
    checkpoint: Checkpoint,
    source: Source,
    *,
    dtype: np.dtype,
    transpose: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decode one source tensor to ``dtype`` (bfloat16 or float32), ``[out, in]`` or, transposed, ``[in, out]``.

    Integer tensors keep their dtype. Quantised weights are recognised by their stored dtype and the scale beside them:
    FP8 (e4m3) with 128x128 tiles, or FP4 (e2m1, two per byte) with groups of 32 inputs. ``out`` is filled and returned
    where given.

    Raises:
        BadInput: scale and weight do not fit each other.
    """
    stored = checkpoint.read(source.weight)
    if source.scale is None:
        return formats.cast_plain(stored, dtype=dtype, transpose=transpose, out=out)
    scale = checkpoint.read(source.scale)
    if stored.dtype == _FP8:
        return formats.decode_fp8(stored, scale, dtype=dtype, transpose=transpose, out=out)
    if stored.dtype in _PACKED_FP4:
        return formats.decode_fp4(stored, scale, dtype=dtype, transpose=transpose, out=out)
    raise AssertionError(f"{source.weight}: {stored.dtype} beside a scale; resolve() lets none through")
