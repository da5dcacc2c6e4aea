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

#: Rows and columns of what a transposing kernel copies at a time to a buffer in the cache. Many rows, because a run of
#: rows is what is written in one piece.
TILE_ROWS, TILE = 512, 128
#: Scale bytes under which every product with an e4m3 or e2m1 code is zero or a normal bfloat16 number, which integer
#: arithmetic can make.
FAST_E4M3, FAST_E2M1 = (10, 246), (2, 252)

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
def _e4m3_to_bfloat16(codes: Bits, byte: int, out: Bits) -> None:
    """Products of e4m3 codes and a scale byte inside :data:`FAST_E4M3`; several at a time, as no table can be read.

    A code has the layout of a bfloat16 number: the exponent moves up by the difference of the biases and by the scale.
    Codes below 8 are multiples of 2^-9 without an implicit one, and get the exponent of their highest bit.
    """
    normal_bias, small_bias = np.uint16((byte - 7) << 7), np.uint16((byte - 9) << 7)
    for i in range(np.uint64(codes.size)):
        code = np.uint16(codes[i])
        magnitude = np.uint16(code & 0x7F)
        small = np.uint16(small_bias + np.uint16(0x80 + (magnitude << 5)))  # 4 to 7
        small = np.uint16(small_bias + np.uint16(magnitude << 6)) if magnitude < 4 else small
        small = small_bias if magnitude < 2 else small
        small = np.uint16(0) if magnitude == 0 else small
        bits = np.uint16((magnitude << 4) + normal_bias) if magnitude >= 8 else small
        bits = np.uint16(0x7FC0) if magnitude == 0x7F else bits
        out[i] = bits | np.uint16((code & 0x80) << 8)


@_inline
def _e2m1_to_bfloat16(bytes_: Bits, shift: int, biases: Bits, out: Bits) -> None:
    """The codes at bit ``shift`` of packed bytes, each under its own scale inside :data:`FAST_E2M1`.

    ``biases`` holds the exponents of the scales, one less, where bfloat16 has its own.
    """
    for i in range(np.uint64(out.size)):
        code = np.uint16(bytes_[i] >> shift)
        magnitude = np.uint16(code & 7)
        bits = np.uint16(np.uint16(magnitude << 6) + biases[i]) if magnitude > 1 else biases[i]  # 1 is a half
        bits = np.uint16(0) if magnitude == 0 else bits
        out[i] = bits | np.uint16((code & 8) << 12)


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
def _turn(tile: Bits, turned: Bits) -> None:
    """Transpose bytes ``[R, C]``, seen as words ``[R, C / 8]``: squares of 8x8 in three steps of exchanged halves.

    Then the look-ups that follow read consecutive bytes, which is what makes them fast.
    """
    for i in range(np.uint64(turned.shape[1])):
        for j in range(np.uint64(tile.shape[1])):
            r = 8 * i
            a, b, c, d = tile[r, j], tile[r + 1, j], tile[r + 2, j], tile[r + 3, j]
            e, f, g, h = tile[r + 4, j], tile[r + 5, j], tile[r + 6, j], tile[r + 7, j]
            a, e = _exchange(a, e, 32, 0x00000000FFFFFFFF)
            b, f = _exchange(b, f, 32, 0x00000000FFFFFFFF)
            c, g = _exchange(c, g, 32, 0x00000000FFFFFFFF)
            d, h = _exchange(d, h, 32, 0x00000000FFFFFFFF)
            a, c = _exchange(a, c, 16, 0x0000FFFF0000FFFF)
            b, d = _exchange(b, d, 16, 0x0000FFFF0000FFFF)
            e, g = _exchange(e, g, 16, 0x0000FFFF0000FFFF)
            f, h = _exchange(f, h, 16, 0x0000FFFF0000FFFF)
            a, b = _exchange(a, b, 8, 0x00FF00FF00FF00FF)
            c, d = _exchange(c, d, 8, 0x00FF00FF00FF00FF)
            e, f = _exchange(e, f, 8, 0x00FF00FF00FF00FF)
            g, h = _exchange(g, h, 8, 0x00FF00FF00FF00FF)
            r = 8 * j
            turned[r, i], turned[r + 1, i], turned[r + 2, i], turned[r + 3, i] = a, b, c, d
            turned[r + 4, i], turned[r + 5, i], turned[r + 6, i], turned[r + 7, i] = e, f, g, h


@_inline
def _exchange(x: int, y: int, shift: int, mask: int) -> tuple[int, int]:
    """The high parts of ``x`` for the low parts of ``y``."""
    shift, mask = np.uint64(shift), np.uint64(mask)
    different = ((x >> shift) ^ y) & mask
    return x ^ (different << shift), y ^ different


@_inline
def _look_up_pairs(table: Bits, wanted: Bits, codes: Bits, low: Bits, high: Bits) -> None:
    shift = 8 * low.itemsize
    for i in range(np.uint64(low.size)):
        pair = table[wanted[i], codes[i]]
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
def decode_e4m3_rows(codes: Bits, table: Bits, index: Bits, block_rows: int, block_columns: int, out: Bits) -> None:
    """:func:`decode_rows` of FP8 to bfloat16 under E8M0 scales, which ``index`` holds and the table is for."""
    rows, columns = codes.shape
    for r in range(rows):
        wanted = index[r // block_rows]
        for b in range(wanted.size):
            start = b * block_columns
            stop = min(start + block_columns, columns)
            if FAST_E4M3[0] <= wanted[b] <= FAST_E4M3[1]:
                _e4m3_to_bfloat16(codes[r, start:stop], wanted[b], out[r, start:stop])
            else:
                _look_up(table[wanted[b]], codes[r, start:stop], out[r, start:stop])


@kernel
def decode_e4m3_columns(codes: Bits, table: Bits, index: Bits, block_rows: int, block_columns: int, out: Bits) -> None:
    """:func:`decode_e4m3_rows` into the transposed ``out`` ``[C, R]``."""
    rows, columns = codes.shape
    tile, turned = np.empty((TILE_ROWS, TILE), np.uint8), np.empty((TILE, TILE_ROWS), np.uint8)
    for c0 in range(0, columns, TILE):
        c1 = min(c0 + TILE, columns)
        for r0 in range(0, rows, TILE_ROWS):
            r1 = min(r0 + TILE_ROWS, rows)
            _fill_tile(codes, r0, r1, c0, c1, tile)
            _turn(tile.view(np.uint64), turned.view(np.uint64))
            for c in range(c0, c1):
                start = r0
                while start < r1:
                    stop = min((start // block_rows + 1) * block_rows, r1)
                    byte, column = (
                        index[start // block_rows, c // block_columns],
                        turned[c - c0, start - r0 : stop - r0],
                    )
                    if FAST_E4M3[0] <= byte <= FAST_E4M3[1]:
                        _e4m3_to_bfloat16(column, byte, out[c, start:stop])
                    else:
                        _look_up(table[byte], column, out[c, start:stop])
                    start = stop


@kernel
def decode_columns(codes: Bits, table: Bits, index: Bits, block_rows: int, block_columns: int, out: Bits) -> None:
    """:func:`decode_rows` into the transposed ``out`` ``[C, R]``."""
    rows, columns = codes.shape
    tile, turned = np.empty((TILE_ROWS, TILE), np.uint8), np.empty((TILE, TILE_ROWS), np.uint8)
    for c0 in range(0, columns, TILE):
        c1 = min(c0 + TILE, columns)
        for r0 in range(0, rows, TILE_ROWS):
            r1 = min(r0 + TILE_ROWS, rows)
            _fill_tile(codes, r0, r1, c0, c1, tile)
            _turn(tile.view(np.uint64), turned.view(np.uint64))
            for c in range(c0, c1):
                start = r0
                while start < r1:
                    stop = min((start // block_rows + 1) * block_rows, r1)
                    row = table[index[start // block_rows, c // block_columns]]
                    _look_up(row, turned[c - c0, start - r0 : stop - r0], out[c, start:stop])
                    start = stop


@kernel
def decode_pair_columns(packed: Bits, table: Bits, index: Bits, block_columns: int, out: Bits) -> None:
    """Two elements per byte, transposed: ``packed`` uint8 ``[R, P]`` into ``out`` ``[2 P, R]``.

    ``table`` ``[N, 256]`` has words of twice the width of ``out``, the even element in the low half; ``index``
    ``[R, ceil(P / block_columns)]``.
    """
    rows, columns = packed.shape
    tile, turned = np.empty((TILE_ROWS, TILE), np.uint8), np.empty((TILE, TILE_ROWS), np.uint8)
    wanted = np.empty(TILE_ROWS, index.dtype)
    for c0 in range(0, columns, TILE):
        c1 = min(c0 + TILE, columns)
        for r0 in range(0, rows, TILE_ROWS):
            r1 = min(r0 + TILE_ROWS, rows)
            _fill_tile(packed, r0, r1, c0, c1, tile)
            _turn(tile.view(np.uint64), turned.view(np.uint64))
            for c in range(c0, c1):
                if c == c0 or c % block_columns == 0:
                    _fill_index(index, 1, r0, r1, c // block_columns, wanted)
                column = turned[c - c0, : r1 - r0]
                _look_up_pairs(table, wanted, column, out[2 * c, r0:r1], out[2 * c + 1, r0:r1])


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


@kernel
def decode_e2m1_columns(packed: Bits, table: Bits, index: Bits, block_columns: int, out: Bits) -> None:
    """:func:`decode_pair_columns` to bfloat16 under E8M0 scales, which ``index`` holds and the table is for."""
    rows, columns = packed.shape
    tile, turned = np.empty((TILE_ROWS, TILE), np.uint8), np.empty((TILE, TILE_ROWS), np.uint8)
    wanted, biases = np.empty(TILE_ROWS, index.dtype), np.empty(TILE_ROWS, np.uint16)
    fast = False
    for c0 in range(0, columns, TILE):
        c1 = min(c0 + TILE, columns)
        for r0 in range(0, rows, TILE_ROWS):
            r1 = min(r0 + TILE_ROWS, rows)
            _fill_tile(packed, r0, r1, c0, c1, tile)
            _turn(tile.view(np.uint64), turned.view(np.uint64))
            for c in range(c0, c1):
                if c == c0 or c % block_columns == 0:
                    _fill_index(index, 1, r0, r1, c // block_columns, wanted)
                    fast = _fill_biases(wanted[: r1 - r0], biases)
                column = turned[c - c0, : r1 - r0]
                low, high = out[2 * c, r0:r1], out[2 * c + 1, r0:r1]
                if fast:
                    _e2m1_to_bfloat16(column, 0, biases, low)
                    _e2m1_to_bfloat16(column, 4, biases, high)
                else:
                    _look_up_pairs(table, wanted, column, low, high)


@_inline
def _fill_biases(scales: Bits, biases: Bits) -> bool:
    """For :func:`_e2m1_to_bfloat16`; False if one of the scales is not for it."""
    lowest, highest = np.uint8(255), np.uint8(0)
    for i in range(np.uint64(scales.size)):
        lowest, highest = min(lowest, scales[i]), max(highest, scales[i])
        biases[i] = np.uint16((np.uint16(scales[i]) - 1) << 7)
    return bool(FAST_E2M1[0] <= lowest and highest <= FAST_E2M1[1])


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
