"""The compiled loops: decode, straight or transposed; cast; count what is rounded; encode.

Everything here works on plain bytes and bit patterns; what a product is stands in :mod:`.tables`, the checks of shapes
and dtypes are in the callers. Codes become numbers by arithmetic, which a processor does on many at a time, not through
a table, which it reads one by one. Each kernel runs on one core without the GIL, so threads scale over the cores.

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
from numba.core import event
from numpy.typing import NDArray

from dsv4_convert.show.compiling import tell

P = ParamSpec("P")
T = TypeVar("T")
Bits = NDArray[np.unsignedinteger[Any]]
Floats = NDArray[np.float32]

#: Rows and columns of the tile that a transposing kernel copies to a buffer in the processor's cache. Its rows are
#: those of a run that is written at once: short runs to many pages take longer than all else.
TILE = (512, 256)
#: Elements after each row of a transposed tile, without which its rows evict one another.
GAP = 64
#: First and last E8M0 byte under which every product with an e4m3 or e2m1 code is zero or a normal bfloat16 number,
#: which arithmetic in integers of 16 bits can make: 2^-9 and 448, or 0.5 and 6, stay between 2^-126 and 2^128.
FAST_E4M3, FAST_E2M1 = (10, 246), (2, 252)

#: Numbers that :func:`count_rounded` counts in 32 bits, before it adds them up in 64.
COUNTED = 1 << 16

#: The operations of :func:`convert` on a bit pattern.
COPY, WIDEN, NARROW = 0, 1, 2


class _Told(event.Listener):
    """Passes on when numba compiles a function that is not in its cache, with the functions that it calls."""

    depth = 0

    def on_start(self, event: event.Event) -> None:
        self.depth += 1
        tell(begins=True)

    def on_end(self, event: event.Event) -> None:
        self.depth -= 1
        if not self.depth:
            tell(begins=False)


event.register("numba:compile", _Told())

# error_model="numpy": a division by zero gives inf or NaN, as in torch, instead of a Python exception.
_inline = numba.njit(nogil=True, error_model="numpy")
# Put into the caller before LLVM sees it. LLVM calls some of these, which costs as much as their 128 elements.
_pasted = numba.njit(nogil=True, error_model="numpy", inline="always")


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
# Integers are cast to 32 or 16 bits at every step: numba widens them to 64, and fewer 64-bit lanes fit in a register.


@_pasted
def _product(value: np.float32, scale: np.float32, sign_of_value: np.uint32) -> np.uint32:
    """The bits of the float32 product of a magnitude, which gets the sign bit given, and a scale."""
    bits = np.uint32(np.float32(value * abs(scale)).view(np.uint32) & np.uint32(0x7FFFFFFF))
    bits = np.uint32(0x7FC00000) if bits > np.uint32(0x7F800000) else bits
    sign = np.uint32(np.float32(scale).view(np.uint32) & np.uint32(0x80000000))
    return np.uint32(bits | np.uint32(sign ^ sign_of_value))


@_pasted
def _e4m3_times(code: np.uint32, scale: np.float32) -> np.uint32:
    magnitude = np.uint32(code & np.uint32(0x7F))
    value = np.uint32(np.uint32(magnitude << np.uint32(20)) + np.uint32(120 << 23)).view(np.float32)
    value = np.float32(np.int32(magnitude)) * np.float32(2.0**-9) if magnitude < np.uint32(8) else value
    value = np.float32(np.nan) if magnitude == np.uint32(0x7F) else value
    return _product(value, scale, np.uint32(np.uint32(code & np.uint32(0x80)) << np.uint32(24)))


@_pasted
def _e2m1_times(code: np.uint32, scale: np.float32) -> np.uint32:
    magnitude = np.uint32(code & np.uint32(7))
    value = np.uint32(np.uint32(magnitude << np.uint32(22)) + np.uint32(126 << 23)).view(np.float32)
    value = np.float32(np.int32(magnitude)) * np.float32(0.5) if magnitude < np.uint32(2) else value
    return _product(value, scale, np.uint32(np.uint32(code & np.uint32(8)) << np.uint32(28)))


@_pasted
def _put(bits: np.uint32, out: Bits, i: int) -> None:
    """A float32 number into ``out``, to nearest even on the 16 bits that go where that has 16."""
    if out.itemsize == 2:
        odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        out[i] = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    else:
        out[i] = bits


@_pasted
def _e4m3_fast(code: np.uint16, byte: int) -> np.uint16:
    """The product of an e4m3 code and the E8M0 ``byte`` inside :data:`FAST_E4M3` in bfloat16.

    A code has the layout of a bfloat16 number: the exponent moves up by the difference of the biases and by the scale.
    Codes below 8 are multiples of 2^-9 without an implicit one, and get the exponent of their highest bit.
    """
    normal_bias, small_bias = np.uint16((byte - 7) << 7), np.uint16((byte - 9) << 7)
    magnitude = np.uint16(code & 0x7F)
    small = np.uint16(small_bias + np.uint16(0x80 + (magnitude << 5)))  # 4 to 7
    small = np.uint16(small_bias + np.uint16(magnitude << 6)) if magnitude < 4 else small
    small = small_bias if magnitude < 2 else small
    small = np.uint16(0) if magnitude == 0 else small
    bits = np.uint16((magnitude << 4) + normal_bias) if magnitude >= 8 else small
    bits = np.uint16(0x7FC0) if magnitude == 0x7F else bits
    return np.uint16(bits | np.uint16((code & 0x80) << 8))


@_pasted
def _e2m1_fast(code: np.uint16, bias: np.uint16) -> np.uint16:
    """The product of an e2m1 code and an E8M0 byte inside :data:`FAST_E2M1` in bfloat16.

    ``bias`` is the exponent of the scale, one less, where bfloat16 has its own.
    """
    magnitude = np.uint16(code & 7)
    bits = np.uint16(np.uint16(magnitude << 6) + bias) if magnitude > 1 else bias  # 1 is a half
    bits = np.uint16(0) if magnitude == 0 else bits
    return np.uint16(bits | np.uint16((code & 8) << 12))


@_pasted
def _fill_biases(scales: Floats, biases: Bits) -> bool:
    """Fill ``biases`` with the scales as :func:`_e2m1_fast` takes them; False if it cannot take one of them."""
    bits = scales.view(np.uint32)
    fast = True
    for i in range(np.uint64(scales.size)):
        exponent = np.uint32(bits[i] >> np.uint32(23))
        biases[i] = np.uint16((exponent - np.uint32(1)) << np.uint32(7))
        power = np.uint32(bits[i] & np.uint32(0x7FFFFF)) == 0
        fast &= power and FAST_E2M1[0] <= exponent and exponent <= FAST_E2M1[1]
    return fast


@_pasted
def _decode_e4m3(codes: Bits, scale: np.float32, out: Bits) -> None:
    """Codes under one scale, the faster way that is exact."""
    pattern = np.float32(scale).view(np.uint32)
    byte = np.int64(pattern) >> 23
    if out.itemsize == 2 and pattern & 0x7FFFFF == 0 and FAST_E4M3[0] <= byte <= FAST_E4M3[1]:
        for i in range(np.uint64(codes.size)):
            out[i] = _e4m3_fast(np.uint16(codes[i]), byte)
    else:
        for i in range(np.uint64(codes.size)):
            _put(_e4m3_times(np.uint32(codes[i]), scale), out, i)


@_inline
def _fill_tile(source: Bits, r0: int, r1: int, c0: int, c1: int, tile: Bits) -> None:
    # Without the copy, the rows of a matrix whose width is a multiple of 4096 bytes evict one another.
    for r in range(r0, r1):
        row, kept = source[r, c0:c1], tile[r - r0]
        for i in range(np.uint64(row.size)):
            kept[i] = row[i]


@_inline
def _transpose(tile: Bits, transposed: Bits) -> None:
    """Transpose bytes ``[R, C]``, seen as words ``[R, C / 8]``: squares of 8x8 in three steps of exchanged halves.

    The loops that follow then read consecutive bytes, which lets them take many at a time. So does the first loop
    here, because it writes as it reads, along rows.
    """
    words = np.uint64(tile.shape[1])
    turning = np.empty((8, tile.shape[1]), np.uint64)
    for i in range(np.uint64(tile.shape[0] // 8)):
        r = 8 * i
        for j in range(words):
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
            turning[0, j], turning[1, j], turning[2, j], turning[3, j] = a, b, c, d
            turning[4, j], turning[5, j], turning[6, j], turning[7, j] = e, f, g, h
        for j in range(words):
            for k in range(np.uint64(8)):
                transposed[8 * j + k, i] = turning[k, j]


@_inline
def _transpose_pairs(tile: Bits, transposed: Bits) -> None:
    """:func:`_transpose` of two bytes each, seen as words ``[R, C / 4]``: squares of 4x4."""
    words = np.uint64(tile.shape[1])
    turning = np.empty((4, tile.shape[1]), np.uint64)
    for i in range(np.uint64(tile.shape[0] // 4)):
        r = 4 * i
        for j in range(words):
            a, b, c, d = tile[r, j], tile[r + 1, j], tile[r + 2, j], tile[r + 3, j]
            a, c = _exchange(a, c, 32, 0x00000000FFFFFFFF)
            b, d = _exchange(b, d, 32, 0x00000000FFFFFFFF)
            a, b = _exchange(a, b, 16, 0x0000FFFF0000FFFF)
            c, d = _exchange(c, d, 16, 0x0000FFFF0000FFFF)
            turning[0, j], turning[1, j], turning[2, j], turning[3, j] = a, b, c, d
        for j in range(words):
            for k in range(np.uint64(4)):
                transposed[4 * j + k, i] = turning[k, j]


@_inline
def _transpose_fours(tile: Bits, transposed: Bits) -> None:
    """:func:`_transpose` of four bytes each, seen as words ``[R, C / 2]``: squares of 2x2."""
    words = np.uint64(tile.shape[1])
    for i in range(np.uint64(tile.shape[0] // 2)):
        for j in range(words):
            a, b = _exchange(tile[2 * i, j], tile[2 * i + 1, j], 32, 0x00000000FFFFFFFF)
            transposed[2 * j, i], transposed[2 * j + 1, i] = a, b


@_inline
def _exchange(x: int, y: int, shift: int, mask: int) -> tuple[int, int]:
    """The high parts of ``x`` for the low parts of ``y``."""
    shift, mask = np.uint64(shift), np.uint64(mask)
    different = ((x >> shift) ^ y) & mask
    return x ^ (different << shift), y ^ different


@kernel
def decode_e4m3_rows(codes: Bits, scale: Floats, block_rows: int, block_columns: int, out: Bits) -> None:
    """``out[r, c] = codes[r, c] * scale[r // block_rows, c // block_columns]``.

    ``codes`` uint8 ``[R, C]``, ``out`` uint16 or uint32 ``[R, C]``, the bits of bfloat16 or float32.
    """
    rows, columns = codes.shape
    for r in range(rows):
        factors = scale[r // block_rows]
        for b in range(factors.size):
            start = b * block_columns
            stop = min(start + block_columns, columns)
            _decode_e4m3(codes[r, start:stop], factors[b], out[r, start:stop])


@kernel
def decode_e4m3_columns(codes: Bits, scale: Floats, block_rows: int, block_columns: int, out: Bits) -> None:
    """:func:`decode_e4m3_rows` into the transposed ``out`` ``[C, R]``."""
    rows, columns = codes.shape
    tile, transposed = np.empty(TILE, np.uint8), np.empty((TILE[1], TILE[0] + GAP), np.uint8)
    for c0 in range(0, columns, TILE[1]):
        c1 = min(c0 + TILE[1], columns)
        for r0 in range(0, rows, TILE[0]):
            r1 = min(r0 + TILE[0], rows)
            _fill_tile(codes, r0, r1, c0, c1, tile)
            _transpose(tile.view(np.uint64), transposed.view(np.uint64))
            for c in range(c0, c1):
                start = r0
                while start < r1:
                    b = start // block_rows
                    stop = min((b + 1) * block_rows, r1)
                    column = transposed[c - c0, start - r0 : stop - r0]
                    _decode_e4m3(column, scale[b, c // block_columns], out[c, start:stop])
                    start = stop


@kernel
def decode_e2m1_rows(packed: Bits, scale: Floats, block_columns: int, out: Bits) -> None:
    """:func:`decode_e4m3_rows` of two codes per byte: ``packed`` uint8 ``[R, P]``, ``out`` ``[R, 2 P]``.

    ``scale`` is ``[R, ceil(P / block_columns)]``.
    """
    rows, columns = packed.shape
    scales, biases = np.empty(columns, np.float32), np.empty(columns, np.uint16)
    for r in range(rows):
        for b in range(scale.shape[1]):
            start = b * block_columns
            scales[start : min(start + block_columns, columns)] = scale[r, b]
        row, to = packed[r], out[r]
        if out.itemsize == 2 and _fill_biases(scales, biases):
            for i in range(np.uint64(columns)):
                to[2 * i] = _e2m1_fast(np.uint16(row[i]), biases[i])
                to[2 * i + 1] = _e2m1_fast(np.uint16(row[i] >> 4), biases[i])
        else:
            for i in range(np.uint64(columns)):
                _put(_e2m1_times(np.uint32(row[i]), scales[i]), to, 2 * i)
                _put(_e2m1_times(np.uint32(row[i] >> 4), scales[i]), to, 2 * i + 1)


@kernel
def decode_e2m1_columns(packed: Bits, scale: Floats, block_columns: int, out: Bits) -> None:
    """:func:`decode_e2m1_rows` into the transposed ``out`` ``[2 P, R]``."""
    rows, columns = packed.shape
    tile, transposed = np.empty(TILE, np.uint8), np.empty((TILE[1], TILE[0] + GAP), np.uint8)
    scales, biases = np.empty(TILE[0], np.float32), np.empty(TILE[0], np.uint16)
    fast = False
    for c0 in range(0, columns, TILE[1]):
        c1 = min(c0 + TILE[1], columns)
        for r0 in range(0, rows, TILE[0]):
            r1 = min(r0 + TILE[0], rows)
            _fill_tile(packed, r0, r1, c0, c1, tile)
            _transpose(tile.view(np.uint64), transposed.view(np.uint64))
            for c in range(c0, c1):
                if c == c0 or c % block_columns == 0:
                    for r in range(r0, r1):
                        scales[r - r0] = scale[r, c // block_columns]
                    fast = out.itemsize == 2 and _fill_biases(scales[: r1 - r0], biases)
                column, low, high = transposed[c - c0], out[2 * c, r0:r1], out[2 * c + 1, r0:r1]
                if fast:
                    for i in range(np.uint64(low.size)):
                        low[i] = _e2m1_fast(np.uint16(column[i]), biases[i])
                        high[i] = _e2m1_fast(np.uint16(column[i] >> 4), biases[i])
                else:
                    for i in range(np.uint64(low.size)):
                        _put(_e2m1_times(np.uint32(column[i]), scales[i]), low, i)
                        _put(_e2m1_times(np.uint32(column[i] >> 4), scales[i]), high, i)


@kernel
def count_codes(codes: Bits, index: Bits, block_rows: int, block_columns: int, counts: Bits) -> None:
    """How often each byte of ``[R, C]`` occurs under each scale, added to ``counts`` ``[N, 256]``.

    ``index[r // block_rows, c // block_columns]`` is the row of ``counts``.
    """
    rows, columns = codes.shape
    for r in range(rows):
        wanted = index[r // block_rows]
        for b in range(wanted.size):
            start = b * block_columns
            row, of = codes[r, start : min(start + block_columns, columns)], counts[wanted[b]]
            for i in range(np.uint64(row.size)):
                of[row[i]] += 1


@kernel
def count_rounded(bits: Bits) -> tuple[int, float]:
    """How many float32 numbers ``[n]`` bfloat16 does not hold, and the largest change relative to the number.

    The change is rounded to float32, and infinity if a number overflows. NaN and infinity themselves do not change.
    """
    rounded, largest, finite = np.int64(0), np.int32(0), np.int32(0)
    for start in range(0, bits.size, COUNTED):
        piece, count = bits[start : start + COUNTED], np.int32(0)
        for i in range(np.uint64(piece.size)):
            magnitude = np.int32(piece[i] & np.uint32(0x7FFFFFFF))
            magnitude = magnitude if magnitude < np.int32(0x7F800000) else np.int32(0)
            lost = np.int32(magnitude & np.int32(0xFFFF))
            # Both in units of the last place: by how much the number moves, and the number itself.
            step = np.int32(min(lost, np.int32(0x10000 - lost)))
            number = np.int32(magnitude & np.int32(0x7FFFFF))
            number = (
                np.int32(number | np.int32(0x800000)) if magnitude >= np.int32(0x800000) else max(number, np.int32(1))
            )
            change = np.float32(np.float32(step) / np.float32(number)).view(np.int32)
            count = np.int32(count + np.int32(lost != 0))
            # The bits of non-negative floats are ordered like their values, and the largest integer is found faster.
            largest, finite = max(largest, change), max(finite, magnitude)
        rounded += count
    return int(rounded), np.inf if finite >= 0x7F7F8000 else np.float64(np.int32(largest).view(np.float32))


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
    """:func:`convert` of ``[R, C]`` into the transposed ``out`` ``[C, R]``, of two or four bytes each."""
    rows, columns = source.shape
    width = TILE[1] // out.itemsize
    tile, transposed = np.empty((TILE[0], width), out.dtype), np.empty((width, TILE[0] + GAP), out.dtype)
    for c0 in range(0, columns, width):
        c1 = min(c0 + width, columns)
        for r0 in range(0, rows, TILE[0]):
            r1 = min(r0 + TILE[0], rows)
            for r in range(r0, r1):
                _convert(source[r, c0:c1], tile[r - r0, : c1 - c0], action)
            if out.itemsize == 2:
                _transpose_pairs(tile.view(np.uint64), transposed.view(np.uint64))
            else:
                _transpose_fours(tile.view(np.uint64), transposed.view(np.uint64))
            for c in range(c0, c1):
                _convert(transposed[c - c0, : r1 - r0], out[c, r0:r1], COPY)


@kernel
def transpose_bytes(source: Bits, out: Bits) -> None:
    """Bytes ``[R, C]`` into the transposed ``out`` ``[C, R]``."""
    rows, columns = source.shape
    tile, transposed = np.empty(TILE, np.uint8), np.empty((TILE[1], TILE[0] + GAP), np.uint8)
    for c0 in range(0, columns, TILE[1]):
        c1 = min(c0 + TILE[1], columns)
        for r0 in range(0, rows, TILE[0]):
            r1 = min(r0 + TILE[0], rows)
            _fill_tile(source, r0, r1, c0, c1, tile)
            _transpose(tile.view(np.uint64), transposed.view(np.uint64))
            for c in range(c0, c1):
                kept, column = out[c, r0:r1], transposed[c - c0]
                for i in range(np.uint64(kept.size)):
                    kept[i] = column[i]


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
