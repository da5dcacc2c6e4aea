"""How many values a conversion rounds, and by how much: the account of what bfloat16 cannot hold.

A code times a power of two has as few significant bits as the code (e4m3: 4, e2m1: 2), so bfloat16 with its 8 holds
it exactly unless it leaves the range of exponents. Whether one does follows from the scale bytes alone, and is nearly
free to prove. Under float32 scales, and in float32 weights, the values are counted.

What is exact: the real product of a code and an E8M0 scale; the float32 product of a code and a float32 scale, which is
what every implementation means by it; a float32 weight itself.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from dsv4_convert.formats import kernels
from dsv4_convert.formats.checks import as_codes, as_scale, read_only
from dsv4_convert.formats.fp4 import decode_fp4
from dsv4_convert.formats.plain import cast_plain
from dsv4_convert.formats.tables import BFLOAT16, FLOAT32, e2m1_products, e4m3_table, e8m0_values
from dsv4_convert.names import FP4_GROUP, FP8_TILE

Array = NDArray[Any]

_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_PIECE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Of ``values`` numbers, ``rounded`` changed, the largest by ``largest_relative`` of itself.

    1.0 is a number that became zero, infinity one that overflowed. NaN and infinity themselves do not change.
    """

    values: int = 0
    rounded: int = 0
    largest_relative: float = 0.0

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(
            self.values + other.values,
            self.rounded + other.rounded,
            max(self.largest_relative, other.largest_relative),
        )


def rounding(stored: Array, scale: Array | None, *, dtype: np.dtype[Any]) -> Rounding:
    """What decoding a stored weight to ``dtype`` changes.

    Args:
        stored: FP8 codes ``[R, C]`` or packed FP4 ``[R, C / 2]`` with scales; without, BF16 or F32 of any shape.
        scale: E8M0 or F32, as in :func:`dsv4_convert.formats.weight.decode_weight`; or None.
        dtype: bfloat16 or float32.

    Raises:
        BadInput: scale and codes do not fit each other.
    """
    if scale is None:
        return _of_floats(stored, dtype)
    if stored.dtype == _FP8:
        codes, block = as_codes(stored, what="FP8", native=ml_dtypes.float8_e4m3fn), FP8_TILE
        shape = codes.shape
    else:
        codes, block = as_codes(stored, what="FP4"), (FP4_GROUP[0], FP4_GROUP[1] // 2)
        shape = (codes.shape[0], 2 * codes.shape[1])
    packed = stored.dtype != _FP8
    factors = as_scale(scale, what="FP4" if packed else "FP8", codes=shape, block=FP4_GROUP if packed else FP8_TILE)
    values = shape[0] * shape[1]
    if factors.dtype != np.float32:
        change = _changes_under_e8m0(packed, np.dtype(dtype))
        present = np.bincount(factors.reshape(-1), minlength=256) > 0
        if not change[present].any():
            return Rounding(values)
        index = factors
    elif packed:
        return _between(decode_fp4(stored, scale, dtype=FLOAT32), decode_fp4(stored, scale, dtype=dtype))
    elif dtype == FLOAT32:
        return Rounding(values)
    else:
        flat = factors.reshape(-1)
        exact, found = (e4m3_table(flat, wanted).view(wanted) for wanted in (FLOAT32, BFLOAT16))
        change = _relative(exact.astype(np.float64), found.astype(np.float64))  # one row of 256 per block
        index = np.arange(flat.size, dtype=np.uint32).reshape(factors.shape)
    counts = np.zeros((len(change), 256), np.uint64)
    kernels.count_codes(codes, read_only(index), block[0], block[1], counts)
    return _weighed(values, counts, change, packed=packed)


def _weighed(values: int, counts: Array, change: Array, *, packed: bool) -> Rounding:
    """From how often each byte occurs under each scale, and what its elements change by."""
    if packed:  # a byte is two codes
        byte = np.arange(256)
        pairs = [(counts, change[:, nibble]) for nibble in (byte & 15, byte >> 4)]
    else:
        pairs = [(counts, change)]
    rounded = sum(int(of[by > 0].sum()) for of, by in pairs)
    largest = max(float(np.max(by, where=of > 0, initial=0.0)) for of, by in pairs)
    return Rounding(values, rounded, largest)


@functools.cache
def _changes_under_e8m0(packed: bool, dtype: np.dtype[Any]) -> Array:
    """Relative change of every code under every scale byte, float64 ``[256, 256]``, or ``[256, 16]`` for FP4."""
    scale = e8m0_values(np.arange(256, dtype=np.uint8))
    # In float64, which has room for all exponents: E8M0 reaches below float32's normal numbers, and its products above.
    power = np.where(np.isnan(scale), np.nan, np.ldexp(1.0, np.arange(256) - 127))[:, None]
    if packed:
        codes = np.arange(16, dtype=np.uint8)[None]
        one = e2m1_products(codes, np.ones((1, 1), np.float32), FLOAT32).view(np.float32)
        found = e2m1_products(codes, scale[:, None], dtype).view(dtype)
    else:
        one = e4m3_table(np.ones(1, np.float32), FLOAT32).view(np.float32)
        found = e4m3_table(scale, dtype).view(dtype)
    return _relative(one.astype(np.float64) * power, found.astype(np.float64))


def _relative(exact: Array, found: Array) -> Array:
    """``|found - exact| / |exact|`` in float64; zero where they are equal or ``exact`` is not a finite number."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        change = np.abs(found - exact) / np.abs(exact)
    return np.where((exact == found) | ~np.isfinite(exact), 0.0, change)


def _of_floats(stored: Array, dtype: np.dtype[Any]) -> Rounding:
    if stored.dtype != FLOAT32 or dtype == FLOAT32:
        return Rounding(stored.size)
    total = Rounding()
    flat = stored.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        total += _between(piece, cast_plain(piece, dtype=dtype))
    return total


def _between(exact: Array, found: Array) -> Rounding:
    with np.errstate(invalid="ignore"):  # a NaN without a quiet bit
        change = _relative(exact.astype(np.float64), found.astype(np.float64))
    return Rounding(exact.size, int(np.count_nonzero(change)), float(change.max(initial=0.0)))
