"""How many values a conversion rounds, and by how much: the account of what bfloat16 cannot hold.

A code times a power of two has as few significant bits as the code (e4m3: 4, e2m1: 2), so bfloat16 with its 8 holds
it exactly unless it leaves the range of exponents. The scale bytes alone decide that, so the proof is nearly free.
With float32 scales, and for float32 weights, the values are counted.

The exact value is the real product of a code and an E8M0 scale, the float32 product of a code and a float32 scale (as
every implementation computes it), or a float32 weight itself.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from dsv4_convert.formats.checks import as_codes, as_scale, read_only
from dsv4_convert.formats.fp4 import decode_fp4
from dsv4_convert.formats.fp8 import decode_fp8
from dsv4_convert.formats.tables import E2M1, E4M3, FLOAT32, e8m0_values, products
from dsv4_convert.spec.names import FP4_GROUP

Array = NDArray[Any]

_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
#: Numbers that are looked at in one piece, so that memory does not grow with the weight.
_PIECE = 1 << 18
#: Rows of codes that are decoded in one piece, or one block of them that is higher.
_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Rounding:
    """The rounding of a set of numbers.

    Attributes:
        values: number of values; NaN and infinity are among them and never change.
        rounded: number of values that changed.
        largest_relative: largest change relative to its value, as precise as float32. 1.0 is a value that became
            zero, infinity one that overflowed.
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


def rounding(
    stored: Array, scale: Array | None, *, dtype: np.dtype[Any], block: tuple[int, int] | None = None
) -> Rounding:
    """Count the values that decoding a stored weight to ``dtype`` changes.

    Args:
        stored: FP8 codes ``[R, C]`` or packed FP4 ``[R, C / 2]`` with scales; without, BF16 or F32 of any shape.
        scale: E8M0 or F32, as in :func:`dsv4_convert.formats.weight.decode_weight`; or None.
        dtype: bfloat16 or float32.
        block: outputs and inputs of FP8 that share a scale.

    Raises:
        BadInput: scale and codes do not fit each other.
    """
    if scale is None:
        return _of_floats(stored, dtype)
    if stored.dtype == _FP8:
        codes, per_code = as_codes(stored, what="FP8", native=ml_dtypes.float8_e4m3fn), 1
        assert block is not None, "FP8 codes are decoded in blocks"
    else:
        codes, per_code, block = as_codes(stored, what="FP4"), 2, FP4_GROUP
    packed, shape = per_code == 2, (codes.shape[0], per_code * codes.shape[1])
    factors = as_scale(scale, what="FP4" if packed else "FP8", codes=shape, block=block)
    values = shape[0] * shape[1]
    if factors.dtype != np.float32:
        change = _changes_under_e8m0(packed, np.dtype(dtype))
        # A range may hold a byte that does not occur; the counts below know.
        if not factors.size or not change[int(factors.min()) : int(factors.max()) + 1].any():
            return Rounding(values)
    elif dtype == FLOAT32:
        return Rounding(values)
    else:
        return _of_products(codes, factors, block, packed=packed)
    from dsv4_convert.formats import kernels

    counts = np.zeros((256, 256), np.uint64)
    kernels.count_codes(codes, read_only(factors), block[0], block[1] // per_code, counts)
    return _weighed(values, counts, change, packed=packed)


def _weighed(values: int, counts: Array, change: Array, *, packed: bool) -> Rounding:
    """Rounding from the counts of each byte under each scale, and the change of its elements."""
    byte = np.arange(256)
    elements = (byte & 7, byte >> 4 & 7) if packed else (byte & 127,)
    changes = [np.take(change, element, axis=1) for element in elements]
    rounded = sum(int(counts[by > 0].sum()) for by in changes)
    largest = max(float(np.max(by, where=counts > 0, initial=0.0)) for by in changes)
    return Rounding(values, rounded, largest)


@functools.cache
def _changes_under_e8m0(packed: bool, dtype: np.dtype[Any]) -> Array:
    """Relative change of every code but for its sign under every scale byte, float64 ``[256, 8 or 128]``."""
    scale, magnitudes = e8m0_values(np.arange(256, dtype=np.uint8))[:, None], E2M1 if packed else E4M3
    # In float64, which has room for all exponents: E8M0 reaches below float32's normal numbers, and its products above.
    exact = magnitudes.astype(np.float64) * scale.astype(np.float64)
    return _relative(exact, products(magnitudes, scale, dtype).view(dtype).astype(np.float64))


def _relative(exact: Array, found: Array) -> Array:
    """``|found - exact| / |exact|`` in float64; zero where they are equal or ``exact`` is not a finite number."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        change = np.abs(found - exact) / np.abs(exact)
    return np.where((exact == found) | ~np.isfinite(exact), 0.0, change)


def _of_products(codes: Array, scale: Array, block: tuple[int, int], *, packed: bool) -> Rounding:
    """Rounding of float32 products, computed for some rows at a time, whole blocks of them."""
    height = -(-_ROWS // block[0]) * block[0]
    values = np.empty((height, codes.shape[1] * (2 if packed else 1)), np.float32)
    total = Rounding()
    for start in range(0, codes.shape[0], height):
        part = codes[start : start + height]
        out = values[: part.shape[0]]
        if packed:
            decode_fp4(part, scale[start : start + height], dtype=FLOAT32, out=out)
        else:
            factors = scale[start // block[0] : (start + height) // block[0]]
            decode_fp8(part, factors, dtype=FLOAT32, block=block, out=out)
        total += _counted(out.reshape(-1))
    return total


def _of_floats(stored: Array, dtype: np.dtype[Any]) -> Rounding:
    if stored.dtype != FLOAT32 or dtype == FLOAT32:
        return Rounding(stored.size)
    total = Rounding()
    flat = stored.reshape(-1)
    for start in range(0, flat.size, _PIECE):  # each copied only where it is not aligned
        total += _counted(np.require(flat[start : start + _PIECE], requirements=["C_CONTIGUOUS", "ALIGNED"]))
    return total


def _counted(values: Array) -> Rounding:
    from dsv4_convert.formats import kernels

    return Rounding(values.size, *kernels.count_rounded(read_only(values.view(np.uint32))))
