"""FP8: e4m3fn codes ``[R, C]`` with one scale per block of 128x128, as DeepSeek-V4 stores its dense weights.

Flash and Pro have E8M0 scales, powers of two; the Base release has float32 scales.
"""

from __future__ import annotations

from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from dsv4_convert.formats.checks import as_codes, as_scale, destination, positive, read_only
from dsv4_convert.formats.scales import as_values, block_amax, float_scale, power_of_two_scale, scale_values
from dsv4_convert.formats.tables import bits_dtype, refuse_flushing

Array = NDArray[Any]

#: Largest finite e4m3fn number.
FP8_MAX = 448.0


def decode_fp8(
    codes: Array,
    scale: Array,
    *,
    dtype: DTypeLike,
    block: tuple[int, int] = (128, 128),
    transpose: bool = False,
    out: Array | None = None,
) -> Array:
    """The weights of an FP8 tensor: ``codes * scale``, as :mod:`.tables` defines the product.

    Args:
        codes: ``[R, C]`` float8_e4m3fn, or the same bytes as uint8 or int8. Not changed, not copied.
        scale: ``[ceil(R / block[0]), ceil(C / block[1])]``, E8M0 (float8_e8m0fnu, uint8 or int8) or float32.
        dtype: bfloat16 or float32.
        block: rows and columns that share a scale.
        transpose: write ``[C, R]``, the kernel orientation of JAX.
        out: C-contiguous buffer of the result's shape and dtype, for example a slice of a stack. Writing into memory
            that was written before is several times faster than into new memory.

    Raises:
        BadInput: a dtype or shape of codes or scale is not as above.
        ValueError: ``dtype``, ``block`` or ``out`` is not as above.
    """
    from dsv4_convert.formats import kernels

    bits = bits_dtype(dtype)
    data = as_codes(codes, what="FP8", native=ml_dtypes.float8_e4m3fn)
    rows, columns = data.shape
    factors = as_scale(scale, what="FP8", codes=data.shape, block=positive(block))
    result = destination(out, shape=(columns, rows) if transpose else (rows, columns), dtype=np.dtype(dtype))
    refuse_flushing()
    decode = kernels.decode_e4m3_columns if transpose else kernels.decode_e4m3_rows
    decode(data, read_only(scale_values(factors)), block[0], block[1], result.view(bits))
    return result


def encode_fp8(
    values: Array, scale: Array, *, block: tuple[int, int] = (128, 128), out: Array | None = None
) -> NDArray[np.uint8]:
    """The e4m3fn codes of ``values`` under given scales: the inverse of :func:`decode_fp8`.

    The float32 quotient ``values / scale`` is rounded to nearest even; beyond ±448, infinity included, it becomes ±448
    (as torch has it after a clamp); a NaN becomes the NaN code of its sign. Codes that decode without overflow or
    underflow are reproduced, -0 included.

    Args:
        values: ``[R, C]`` float32 or bfloat16.
        scale, block: as in :func:`decode_fp8`.
        out: C-contiguous uint8 ``[R, C]``.

    Raises:
        BadInput, ValueError: as in :func:`decode_fp8`.
    """
    from dsv4_convert.formats import kernels

    data = as_values(values, what="FP8")
    factors = scale_values(as_scale(scale, what="FP8", codes=data.shape, block=positive(block)))
    result = destination(out, shape=data.shape, dtype=np.dtype(np.uint8))
    kernels.encode_e4m3(data, read_only(factors), block[0], block[1], result)
    return result


def quantize_fp8(
    values: Array, *, block: tuple[int, int] = (128, 128), scale_format: Literal["e8m0", "float32"] = "e8m0"
) -> tuple[NDArray[np.uint8], Array]:
    """Choose a scale for every block and encode.

    Args:
        values: ``[R, C]`` float32 or bfloat16, finite.
        block: rows and columns that share a scale.
        scale_format: "e8m0": the smallest power of two 2^k with ``amax <= 448 * 2^k``, ``amax`` being the largest
            magnitude of the block (DeepSeek's rounding of scales, "ue8m0"). "float32": ``amax / 448``. A block of
            zeros has scale 1.

    Returns:
        Codes uint8 ``[R, C]`` and scales, uint8 (E8M0) or float32 ``[ceil(R / block[0]), ceil(C / block[1])]``.

    Raises:
        BadInput: values that are not finite, or of another dtype or rank.
    """
    data = as_values(values, what="FP8")
    amax = block_amax(data, positive(block), what="FP8")
    scale = power_of_two_scale(amax, FP8_MAX) if scale_format == "e8m0" else float_scale(amax, FP8_MAX)
    return encode_fp8(data, scale, block=block), scale
