"""Is what a checkpoint stores a number? These checks find values that no quantiser writes.

* A scale is a finite number that is not negative: E8M0 spells NaN as 0xFF, and the sign belongs to the codes. A block
  of zeros has scale zero.
* A code of e4m3 is not NaN (0x7F, 0xFF); e2m1 has none.
* A code times its scale, and a float32 weight that is narrowed, stays in the range of the result.
* An unquantised tensor has no NaN. A stored infinity is kept: it may be meant, such as the bias of an expert that must
  not be chosen.

Each function returns the first problem in words, or None. The cost is two passes over stored bytes in the processor's
cache; for FP4, over the scales alone.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from dsv4_convert.formats.tables import BFLOAT16, FLOAT32

Array = NDArray[Any]

_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
#: Elements that are looked at in one piece.
_PIECE = 1 << 17
_E8M0_NAN, _E4M3_NAN = 0xFF, 0x7F
#: Float32 halfway from the largest bfloat16 to the next power of two: from here on rounding gives infinity.
_BEYOND_BFLOAT16 = 0x7F7F8000
#: Bits of a number without its sign, and those of infinity: above it is NaN.
_SPECIAL = {BFLOAT16: (np.uint16, 0x7FFF, 0x7F80), FLOAT32: (np.uint32, 0x7FFFFFFF, 0x7F800000)}


def scale_problem(scale: Array, *, first_row: int = 0) -> str | None:
    """What is wrong with scales, E8M0 or float32; ``first_row`` is the number of the first row that is given."""
    if scale.dtype == FLOAT32:
        wrong = ~(np.isfinite(scale) & (scale >= 0))
        if not wrong.any():
            return None
        at = _first(wrong)
        found = f"{scale[at]}"
    else:
        codes = scale.view(np.uint8)
        if not codes.size or int(codes.max()) != _E8M0_NAN:
            return None
        at = _first(codes == _E8M0_NAN)
        found = "NaN (byte 0xFF)"
    return f"the scale at {_place(at, first_row)} is {found}, expected a finite number that is not negative"


def code_problem(stored: Array, *, first_row: int = 0) -> str | None:
    """What is wrong with the codes of a quantised weight: a NaN among those of FP8."""
    if stored.dtype != _FP8:
        return None
    codes = np.ascontiguousarray(stored).view(np.uint8)
    if _largest(codes, _E4M3_NAN) != _E4M3_NAN:
        return None
    at = _first(codes & _E4M3_NAN == _E4M3_NAN)
    return f"the code at {_place(at, first_row)} is NaN (byte 0x{int(codes[at]):02X}), expected a number"


def plain_problem(stored: Array, *, first_row: int = 0) -> str | None:
    """The first NaN of an unquantised tensor; a tensor of integers has no problem."""
    if stored.dtype not in _SPECIAL:
        return None
    kind, magnitude, infinity = _SPECIAL[stored.dtype]
    bits = np.ascontiguousarray(stored).view(kind)
    if _largest(bits, magnitude) <= infinity:
        return None
    at = _first((bits & kind(magnitude)) > infinity)
    return f"the value at {_place(at, first_row)} is NaN, expected a number"


def narrowing_problem(stored: Array, *, dtype: np.dtype[Any], first_row: int = 0) -> str | None:
    """Whether a finite float32 number would become infinite in ``dtype``."""
    if stored.dtype != FLOAT32 or dtype != BFLOAT16:
        return None
    kind, magnitude, infinity = _SPECIAL[FLOAT32]
    bits = np.ascontiguousarray(stored).view(kind)
    if _largest(bits, magnitude) < _BEYOND_BFLOAT16:
        return None
    sizes = bits & kind(magnitude)
    too_large = (sizes >= _BEYOND_BFLOAT16) & (sizes != infinity)
    if not too_large.any():
        return None
    at = _first(too_large)
    return f"the value at {_place(at, first_row)} is {stored[at]}, beyond the largest bfloat16, 3.39e38"


def decoded_problem(
    stored: Array, scale: Array, decoded: Array, *, first_row: int = 0, first_scale: int = 0, transposed: bool = False
) -> str | None:
    """The first problem of codes, their scales and the decoded values (``transposed``: decoded as ``[in, out]``).

    ``first_row`` and ``first_scale`` are the row numbers at which the given codes and scales begin.
    """
    problem = scale_problem(scale, first_row=first_scale) or code_problem(stored, first_row=first_row)
    if problem is not None or not scale.size:
        return problem
    from dsv4_convert.formats.kernels import FAST_E2M1, FAST_E4M3

    # The largest scale, as an E8M0 byte, under which no product leaves the range.
    safe = (FAST_E4M3 if stored.dtype == _FP8 else FAST_E2M1)[1]
    if scale.dtype == FLOAT32:
        if float(scale.max()) <= 2.0 ** (safe - 127):
            return None
    elif int(scale.view(np.uint8).max()) <= safe:
        return None
    beyond = ~np.isfinite(decoded.astype(np.float32))
    if not beyond.any():
        return None
    at = _first(beyond.T if transposed else beyond)
    return f"code times scale at {_place(at, first_row)} is beyond the largest {decoded.dtype}, expected a number"


def table_problem(table: Array, experts: int, *, first_row: int = 0) -> str | None:
    """What is wrong with a table of experts: numbers that none of ``experts`` has."""
    wrong = (table < 0) | (table >= experts)
    if not wrong.any():
        return None
    at = _first(wrong)
    return (
        f"the expert at {_place(at, first_row)} is {int(table[at])}, expected one from 0 to {experts - 1}, as "
        f"config.json has {experts} experts"
    )


def _largest(bits: Array, mask: int) -> int:
    """The largest of ``bits & mask``, computed piece by piece; 0 if there are none."""
    flat, largest = bits.reshape(-1), 0
    kept = np.empty(min(flat.size, _PIECE), flat.dtype)
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        largest = max(largest, int(np.bitwise_and(piece, flat.dtype.type(mask), out=kept[: piece.size]).max()))
    return largest


def _first(wrong: Array) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(wrong)), wrong.shape))


def _place(at: tuple[int, ...], first_row: int) -> list[int]:
    return [first_row + at[0], *at[1:]] if at else []
