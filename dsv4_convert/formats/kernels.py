"""The compiled loops: look a code up in a table, straight or transposed; cast; encode.

Everything here works on plain bytes and bit patterns; the meaning of the tables is in :mod:`.tables`, the checks of
shapes and dtypes are in the callers. Each kernel runs on one core without the GIL, so threads scale over the cores.

All kernels live in one file on purpose: numba invalidates a cached kernel when the file that defines it changes, and
does not look at functions that it calls from other files.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

P = ParamSpec("P")
T = TypeVar("T")
Bits = NDArray[np.unsignedinteger[Any]]
Floats = NDArray[np.float32]

#: Rows and columns of the square that a transposing kernel copies to a buffer which stays in the level-1 cache.
TILE = 128

#: What :func:`convert` does with a bit pattern.
COPY, WIDEN, NARROW = 0, 1, 2

# error_model="numpy": a division by zero gives inf or NaN, as in torch, instead of a Python exception.
_inline = numba.njit(nogil=True, error_model="numpy")


def kernel(function: Callable[P, T]) -> Callable[P, T]:
    """Compile for each combination of argument types on first use, and keep the result on disk where that is possible.

    numba writes beside the source, else to the user's cache directory, else to ``NUMBA_CACHE_DIR``. Where none of them
    can be written (a read-only container), or the write or read fails later (disk full, a damaged file), the kernel is
    compiled in memory instead: a second per process, never an error.
    """

    def in_memory() -> Any:
        return numba.njit(nogil=True, error_model="numpy")(function)

    try:
        compiled = numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # "no locator available": no directory can be written
        compiled = in_memory()

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal compiled
        try:
            return compiled(*args, **kwargs)
        except (OSError, EOFError, pickle.UnpicklingError):  # the kernels do no I/O themselves
            compiled = in_memory()
            return compiled(*args, **kwargs)

    return call


# Unsigned loop counters spare numba's check for negative indices, which costs half of the speed of these loops.


@_inline
def _look_up(row: Bits, codes: Bits, out: Bits) -> None:
    for i in range(np.uint64(codes.size)):
        out[i] = row[codes[i]]


@_inline
def _fill_tile(source: Bits, r0: int, r1: int, c0: int, c1: int, tile: Bits) -> None:
    # Without the copy, the rows of a matrix whose width is a multiple of 4096 bytes evict one another.
    for r in range(r0, r1):
        row, kept = source[r, c0:c1], tile[r - r0]
        for i in range(np.uint64(row.size)):
            kept[i] = row[i]


@_inline
def _fill_index(index: Bits, block_rows: int, r0: int, r1: int, column: int, wanted: Bits) -> None:
    for r in range(r0, r1):
        wanted[r - r0] = index[r // block_rows, column]


@_inline
def _look_up_column(table: Bits, wanted: Bits, tile: Bits, column: int, out: Bits) -> None:
    j = np.uint64(column)
    for i in range(np.uint64(out.size)):
        out[i] = table[wanted[i], tile[i, j]]


@_inline
def _look_up_pair_column(table: Bits, wanted: Bits, tile: Bits, column: int, low: Bits, high: Bits) -> None:
    j = np.uint64(column)
    shift = 8 * low.itemsize
    for i in range(np.uint64(low.size)):
        pair = table[wanted[i], tile[i, j]]
        low[i] = pair
        high[i] = pair >> shift


@kernel
def decode_rows(codes: Bits, table: Bits, index: Bits, block_rows: int, block_columns: int, out: Bits) -> None:
    """``out[r, c] = table[index[r // block_rows, c // block_columns], codes[r, c]]``.

    ``codes`` uint8 ``[R, C]``, ``table`` ``[N, 256]`` of the dtype of ``out`` ``[R, C]``.
    """
    rows, columns = codes.shape
    for r in range(rows):
        wanted = index[r // block_rows]
        for b in range(wanted.size):
            start = b * block_columns
            stop = min(start + block_columns, columns)
            _look_up(table[wanted[b]], codes[r, start:stop], out[r, start:stop])


@kernel
def decode_columns(codes: Bits, table: Bits, index: Bits, block_rows: int, block_columns: int, out: Bits) -> None:
    """:func:`decode_rows` into the transposed ``out`` ``[C, R]``."""
    rows, columns = codes.shape
    tile = np.empty((TILE, TILE), codes.dtype)
    wanted = np.empty(TILE, index.dtype)
    for c0 in range(0, columns, TILE):
        c1 = min(c0 + TILE, columns)
        for r0 in range(0, rows, TILE):
            r1 = min(r0 + TILE, rows)
            _fill_tile(codes, r0, r1, c0, c1, tile)
            for c in range(c0, c1):
                if c == c0 or c % block_columns == 0:
                    _fill_index(index, block_rows, r0, r1, c // block_columns, wanted)
                _look_up_column(table, wanted, tile, c - c0, out[c, r0:r1])


@kernel
def decode_pair_columns(packed: Bits, table: Bits, index: Bits, block_columns: int, out: Bits) -> None:
    """Two elements per byte, transposed: ``packed`` uint8 ``[R, P]`` into ``out`` ``[2 P, R]``.

    ``table`` ``[N, 256]`` has words of twice the width of ``out``, the even element in the low half; ``index``
    ``[R, ceil(P / block_columns)]``.
    """
    rows, columns = packed.shape
    tile = np.empty((TILE, TILE), packed.dtype)
    wanted = np.empty(TILE, index.dtype)
    for c0 in range(0, columns, TILE):
        c1 = min(c0 + TILE, columns)
        for r0 in range(0, rows, TILE):
            r1 = min(r0 + TILE, rows)
            _fill_tile(packed, r0, r1, c0, c1, tile)
            for c in range(c0, c1):
                if c == c0 or c % block_columns == 0:
                    _fill_index(index, 1, r0, r1, c // block_columns, wanted)
                _look_up_pair_column(table, wanted, tile, c - c0, out[2 * c, r0:r1], out[2 * c + 1, r0:r1])


@kernel
def count_codes(codes: Bits, index: Bits, block_rows: int, block_columns: int, counts: Bits) -> None:
    """How often each byte occurs under each scale, added to ``counts`` ``[N, 256]``; else as :func:`decode_rows`."""
    rows, columns = codes.shape
    for r in range(rows):
        wanted = index[r // block_rows]
        for b in range(wanted.size):
            start = b * block_columns
            row, of = codes[r, start : min(start + block_columns, columns)], counts[wanted[b]]
            for i in range(np.uint64(row.size)):
                of[row[i]] += 1


@_inline
def _narrow(bits: int) -> int:
    # Round to nearest even on the 16 bits that go; a NaN becomes the quiet NaN of the same sign.
    if bits & 0x7FFFFFFF > 0x7F800000:
        return (bits >> 16) & 0x8000 | 0x7FC0
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@_inline
def _convert(source: Bits, out: Bits, action: int) -> None:
    n = np.uint64(source.size)
    if action == COPY:
        for i in range(n):
            out[i] = source[i]
    elif action == WIDEN:
        for i in range(n):
            out[i] = np.uint32(source[i]) << 16
    else:
        for i in range(n):
            out[i] = _narrow(source[i])


@kernel
def convert(source: Bits, out: Bits, action: int) -> None:
    """Copy, widen (bfloat16 -> float32) or narrow (float32 -> bfloat16, to nearest even) the bit patterns ``[n]``."""
    _convert(source, out, action)


@kernel
def convert_columns(source: Bits, out: Bits, action: int) -> None:
    """:func:`convert` of ``[R, C]`` into the transposed ``out`` ``[C, R]``."""
    rows, columns = source.shape
    tile = np.empty((TILE, TILE), out.dtype)
    for c0 in range(0, columns, TILE):
        c1 = min(c0 + TILE, columns)
        for r0 in range(0, rows, TILE):
            r1 = min(r0 + TILE, rows)
            for r in range(r0, r1):
                _convert(source[r, c0:c1], tile[r - r0, : c1 - c0], action)
            for c in range(c0, c1):
                kept, j = out[c, r0:r1], np.uint64(c - c0)
                for i in range(np.uint64(kept.size)):
                    kept[i] = tile[i, j]


@kernel
def block_amax(magnitude_bits: Bits, block_rows: int, block_columns: int, out: Bits) -> None:
    """Largest float32 magnitude of each block, as bits: uint32 ``[R, C]`` into ``[ceil(R / br), ceil(C / bc)]``.

    The bits of non-negative floats are ordered like their values, with NaN above infinity. ``out`` starts as zeros.
    """
    rows, columns = magnitude_bits.shape
    for r in range(rows):
        for b in range(out.shape[1]):
            start = b * block_columns
            part = magnitude_bits[r, start : min(start + block_columns, columns)]
            largest = out[r // block_rows, b]
            for i in range(np.uint64(part.size)):
                largest = max(largest, part[i] & np.uint32(0x7FFFFFFF))
            out[r // block_rows, b] = largest


@_inline
def _divide_row(
    values: Floats, scale: Floats, block_columns: int, shift: np.float32, quotient: Floats, small: Floats
) -> None:
    for b in range(scale.size):
        start = b * block_columns
        stop = min(start + block_columns, values.size)
        for c in range(np.uint64(start), np.uint64(stop)):
            quotient[c] = values[c] / scale[b]
            # Adding 2^23 steps leaves the number of steps, rounded to nearest even, in the low bits of the mantissa.
            small[c] = abs(quotient[c]) + shift


@kernel
def encode_e4m3(values: Floats, scale: Floats, block_rows: int, block_columns: int, out: Bits) -> None:
    """``out = e4m3(values / scale)``, float32 ``[R, C]`` to uint8: nearest even, ±448 beyond the range, NaN kept."""
    rows, columns = values.shape
    quotient, small = np.empty(columns, np.float32), np.empty(columns, np.float32)
    bits, small_bits = quotient.view(np.uint32), small.view(np.uint32)
    shift = np.float32(2.0**14)  # 2^23 steps of 2^-9, the step of the subnormal codes
    shift_bits = 0x46800000
    for r in range(rows):
        _divide_row(values[r], scale[r // block_rows], block_columns, shift, quotient, small)
        row = out[r]
        for c in range(np.uint64(columns)):
            pattern = np.int64(bits[c])  # signed throughout: numba makes a float of signed and unsigned together
            magnitude = pattern & 0x7FFFFFFF
            code = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
            code = np.int64(small_bits[c]) - shift_bits if magnitude < 0x3C800000 else code  # below 2^-6
            code = 0x7E if magnitude >= 0x43E00000 else code  # 448
            code = 0x7F if magnitude > 0x7F800000 else code
            row[c] = code | ((pattern >> 24) & 0x80)


@kernel
def encode_e2m1(values: Floats, scale: Floats, block_columns: int, out: Bits) -> int:
    """``out = e2m1(values / scale)`` packed by two: float32 ``[R, C]`` to uint8 ``[R, C / 2]``.

    Rounds to nearest even, ±6 beyond the range. Returns how many quotients were NaN, which e2m1 cannot express.
    """
    rows, columns = values.shape
    quotient, small = np.empty(columns, np.float32), np.empty(columns, np.float32)
    bits, small_bits = quotient.view(np.uint32), small.view(np.uint32)
    codes = np.empty(columns, np.uint8)
    shift = np.float32(2.0**22)  # 2^23 steps of 0.5
    shift_bits = 0x4A800000
    lost = 0
    for r in range(rows):
        _divide_row(values[r], scale[r], block_columns, shift, quotient, small)
        for c in range(np.uint64(columns)):
            pattern = np.int64(bits[c])
            magnitude = pattern & 0x7FFFFFFF
            lost += magnitude > 0x7F800000
            code = ((magnitude + 0x1FFFFF + ((magnitude >> 22) & 1)) >> 22) - (126 << 1)
            code = np.int64(small_bits[c]) - shift_bits if magnitude < 0x3F800000 else code  # below 1
            code = 7 if magnitude >= 0x40C00000 else code  # 6
            codes[c] = code | ((pattern >> 28) & 8)
        row = out[r]
        for c in range(np.uint64(row.size)):
            row[c] = codes[2 * c] | (codes[2 * c + 1] << 4)
    return lost
