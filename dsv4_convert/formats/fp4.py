"""FP4: e2m1 codes, two per byte, with one scale per 32 consecutive inputs of a row: the routed experts.

The low four bits of a byte are the even element. Code to value: 0, 0.5, 1, 1.5, 2, 3, 4, 6, with the sign in bit 3.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dsv4_convert.errors import BadInput
from dsv4_convert.formats.checks import as_codes, as_scale, destination, read_only
from dsv4_convert.formats.scales import as_values, block_amax, power_of_two_scale, scale_values
from dsv4_convert.formats.tables import bits_dtype, refuse_flushing

Array = NDArray[Any]

#: Largest e2m1 number.
FP4_MAX = 6.0


def decode_fp4(
    packed: Array,
    scale: Array,
    *,
    dtype: DTypeLike,
    group: int = 32,
    transpose: bool = False,
    out: Array | None = None,
) -> Array:
    """The weights of a packed FP4 tensor: ``codes * scale``, as :mod:`.tables` defines the product.

    Args:
        packed: ``[R, C / 2]`` uint8 or int8, the low half of a byte first. Not changed, not copied.
        scale: ``[R, ceil(C / group)]``, E8M0 (float8_e8m0fnu, uint8 or int8) or float32.
        dtype: bfloat16 or float32.
        group: consecutive elements of a row that share a scale; even.
        transpose: write ``[C, R]``, the kernel orientation of JAX.
        out: C-contiguous buffer of the result's shape and dtype, for example a slice of a stack. Writing into memory
            that was written before is several times faster than into new memory.

    Raises:
        BadInput: a dtype or shape of codes or scale is not as above.
        ValueError: ``dtype``, ``group`` or ``out`` is not as above.
    """
    from dsv4_convert.formats import kernels

    bits = bits_dtype(dtype)
    data = as_codes(packed, what="FP4")
    rows, columns = data.shape[0], 2 * data.shape[1]
    factors = as_scale(scale, what="FP4", codes=(rows, columns), block=(1, _even(group)))
    result = destination(out, shape=(columns, rows) if transpose else (rows, columns), dtype=np.dtype(dtype))
    refuse_flushing()
    decode = kernels.decode_e2m1_columns if transpose else kernels.decode_e2m1_rows
    decode(data, read_only(scale_values(factors)), group // 2, result.view(bits))
    return result


def encode_fp4(values: Array, scale: Array, *, group: int = 32, out: Array | None = None) -> NDArray[np.uint8]:
    """The packed e2m1 codes of ``values`` under given scales: the inverse of :func:`decode_fp4`.

    The float32 quotient ``values / scale`` is rounded to nearest even; beyond ±6, infinity included, it becomes ±6.

    Args:
        values: ``[R, C]`` float32 or bfloat16, C even.
        scale, group: as in :func:`decode_fp4`.
        out: C-contiguous uint8 ``[R, C / 2]``.

    Raises:
        BadInput: as in :func:`decode_fp4`, or a quotient is NaN, which e2m1 cannot express.
        ValueError: as in :func:`decode_fp4`.
    """
    from dsv4_convert.formats import kernels

    data = as_values(values, what="FP4")
    rows, columns = data.shape
    if columns % 2:
        raise BadInput(f"FP4 values: expected an even number of columns, two per byte, found shape {data.shape}")
    factors = scale_values(as_scale(scale, what="FP4", codes=(rows, columns), block=(1, _even(group))))
    result = destination(out, shape=(rows, columns // 2), dtype=np.dtype(np.uint8))
    lost = kernels.encode_e2m1(data, read_only(factors), group, result)
    if lost:
        raise BadInput(f"FP4 values: expected numbers, found {lost} quotients of value and scale that are NaN")
    return result


def quantize_fp4(values: Array, *, group: int = 32) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Choose a power-of-two scale for every group and encode.

    The scale is the smallest 2^k with ``amax <= 6 * 2^k``, ``amax`` being the largest magnitude of the group; a group
    of zeros has scale 1.

    Args:
        values: ``[R, C]`` float32 or bfloat16, finite, C even.
        group: consecutive elements of a row that share a scale; even.

    Returns:
        Packed codes uint8 ``[R, C / 2]`` and E8M0 scales uint8 ``[R, ceil(C / group)]``.

    Raises:
        BadInput: values that are not finite, of another dtype or rank, or an odd number of columns.
    """
    data = as_values(values, what="FP4")
    scale = power_of_two_scale(block_amax(data, (1, _even(group)), what="FP4"), FP4_MAX)
    return encode_fp4(data, scale, group=group), scale


def _even(group: int) -> int:
    if group < 2 or group % 2:
        raise ValueError(f"group is {group}; a group is an even number of elements, because two share a byte")
    return group
