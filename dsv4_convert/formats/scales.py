"""Choosing and reading scales, for the encoders."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4_convert.errors import BadInput
from dsv4_convert.formats.checks import read_only
from dsv4_convert.formats.plain import cast_plain
from dsv4_convert.formats.tables import BFLOAT16, e8m0_values

Array = NDArray[Any]


def as_values(values: Array, *, what: str) -> NDArray[np.float32]:
    """Values to encode as read-only, contiguous float32 ``[R, C]``; BadInput unless a float32 or bfloat16 matrix."""
    if values.ndim != 2 or values.dtype not in (BFLOAT16, np.float32):
        raise BadInput(f"{what} values: expected a matrix of float32 or bfloat16, found {values.dtype} {values.shape}")
    if values.dtype == BFLOAT16:
        values = cast_plain(values, dtype=np.float32)
    return read_only(np.require(values, requirements=["C_CONTIGUOUS", "ALIGNED"]))


def scale_values(scale: Array) -> NDArray[np.float32]:
    """The float32 values of scales, E8M0 bytes or already float32."""
    return scale if scale.dtype == np.float32 else e8m0_values(scale)


def block_amax(values: NDArray[np.float32], block: tuple[int, int], *, what: str) -> NDArray[np.float32]:
    """Largest magnitude of each block: ``[R, C]`` -> ``[ceil(R / block[0]), ceil(C / block[1])]``.

    Raises:
        BadInput: a block holds NaN or infinity, which no scale can express.
    """
    from dsv4_convert.formats import kernels

    rows, columns = (-(-size // step) for size, step in zip(values.shape, block, strict=True))
    amax = np.zeros((rows, columns), np.uint32)
    kernels.block_amax(values.view(np.uint32), block[0], block[1], amax)
    result = amax.view(np.float32)
    if not np.isfinite(result).all():
        row, column = (int(position) for position in np.argwhere(~np.isfinite(result))[0])
        raise BadInput(
            f"{what} values: expected finite numbers, found NaN or infinity in the block at row {row * block[0]}, "
            f"column {column * block[1]}"
        )
    return result


def power_of_two_scale(amax: NDArray[np.float32], largest: float) -> NDArray[np.uint8]:
    """E8M0 bytes of the smallest powers of two with ``amax <= largest * scale``; 1 where ``amax`` is zero.

    The exponent is read from the quotient, not from a logarithm: ``log2`` can be off at an exact power of two.
    """
    fraction, exponent = np.frexp(amax.astype(np.float64) / largest)  # fraction in [0.5, 1), or 0
    rounded_up = np.where((fraction == 0.5) & (amax > 0), exponent - 1, exponent)
    return np.clip(rounded_up + 127, 0, 254).astype(np.uint8)


def float_scale(amax: NDArray[np.float32], largest: float) -> NDArray[np.float32]:
    """``amax / largest``, not below the smallest normal float32 (whose inverse is finite); 1 where ``amax`` is zero."""
    scale = np.maximum(amax / np.float32(largest), np.finfo(np.float32).tiny)
    return np.where(amax > 0, scale, np.float32(1)).astype(np.float32)
