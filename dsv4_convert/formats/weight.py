"""Any stored weight to plain numbers: the storage is recognised by the dtype and the scale beside it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from dsv4_convert.errors import BadInput
from dsv4_convert.formats import cast_plain, decode_fp4, decode_fp8

_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
#: Dtypes in which packed FP4 is stored.
PACKED_FP4 = (np.dtype(np.int8), np.dtype(np.uint8))


def decode_weight(
    stored: np.ndarray[Any, Any],
    scale: np.ndarray[Any, Any] | None,
    *,
    dtype: np.dtype[Any],
    transpose: bool = False,
    out: np.ndarray[Any, Any] | None = None,
) -> np.ndarray[Any, Any]:
    """Decode ``[out, in]`` to ``dtype``, optionally as ``[in, out]``.

    With a scale: FP8 (e4m3) in 128x128 tiles, or FP4 (e2m1, two per byte) in groups of 32 inputs. Without: BF16 or F32
    are converted, integers keep their dtype. ``out`` is filled and returned where given.

    Raises:
        BadInput: a scale beside a dtype that has none, or of the wrong shape.
    """
    if scale is None:
        return cast_plain(stored, dtype=dtype, transpose=transpose, out=out)
    if stored.dtype == _FP8:
        return decode_fp8(stored, scale, dtype=dtype, transpose=transpose, out=out)
    if stored.dtype in PACKED_FP4:
        return decode_fp4(stored, scale, dtype=dtype, transpose=transpose, out=out)
    raise BadInput(f"a weight of dtype {stored.dtype} has no scale; expected float8_e4m3fn or packed int8")
