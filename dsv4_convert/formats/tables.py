"""The tables that decoding looks codes up in: every code of a format times a scale, rounded, as bit patterns.

The product is the float32 product of code and scale, for bfloat16 rounded again to nearest even: what torch computes
with ``(codes.float() * scale.float()).to(dtype)``. With an E8M0 scale the first product is exact or infinite, so the
result is the exact product rounded once.

Two things that IEEE 754 leaves open are fixed here: the sign bit of every result, zeros and NaN included, is that of
the code times that of the scale, and a NaN is the quiet NaN without payload (0x7FC0 or 0x7FC00000 and the sign).
"""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from dsv4_convert.errors import Dsv4Error

Bits = NDArray[np.unsignedinteger[Any]]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)

#: What e2m1 expresses, by the three bits below the sign.
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)

_QUIET_NAN = 0x7FC00000


def bits_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """The unsigned integer that holds the bits of a decoded element; ValueError unless bfloat16 or float32."""
    match np.dtype(dtype):
        case wanted if wanted == BFLOAT16:
            return np.dtype(np.uint16)
        case wanted if wanted == FLOAT32:
            return np.dtype(np.uint32)
        case other:
            raise ValueError(f"dtype is {other}; decoding gives bfloat16 or float32")


def e8m0_values(scale: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The float32 values of E8M0 bytes: byte b is 2^(b - 127), byte 255 is NaN (OCP Microscaling formats 1.0)."""
    return scale.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)


@functools.cache
def _e4m3_magnitudes() -> NDArray[np.float32]:
    """What e4m3fn expresses, by the seven bits below the sign; the last one is NaN."""
    return np.arange(128, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def _products(magnitudes: NDArray[np.float32], scale: NDArray[np.float32], dtype: DTypeLike) -> Bits:
    """The bits of ``magnitudes * scale`` with the sign of the scale; the shapes broadcast.

    Raises:
        Dsv4Error: this thread flushes subnormal floats to zero, so the products would be wrong.
    """
    if np.float32(2.0**-126) * np.float32(0.5) == 0:
        raise Dsv4Error(
            "this thread flushes subnormal floats to zero, which changes small weights: expected IEEE 754 arithmetic. "
            "A library built with -ffast-math or torch.set_flush_denormal(True) does that; convert without it"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        product = magnitudes * np.abs(scale)
    bits = np.where(np.isnan(product), np.uint32(_QUIET_NAN), product.view(np.uint32))
    bits |= np.signbit(scale).astype(np.uint32) << np.uint32(31)
    if bits_dtype(dtype) == np.uint32:
        return bits
    # To nearest even on the 16 bits that go. A carry out of the largest finite number gives infinity, as it should.
    bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits >> np.uint32(16)).astype(np.uint16)


def _both_signs(products: Bits) -> Bits:
    """``[N, K]`` products of the non-negative codes -> ``[N, 2 K]``, the negative codes in the second half."""
    sign = products.dtype.type(1 << (8 * products.dtype.itemsize - 1))
    return np.concatenate([products, products ^ sign], axis=1)


def e4m3_table(scale: NDArray[np.float32], dtype: DTypeLike) -> Bits:
    """The bits of every e4m3fn code times each scale: float32 ``[N]`` -> uint16 or uint32 ``[N, 256]``."""
    return _both_signs(_products(_e4m3_magnitudes(), scale[:, None], dtype))


def e2m1_products(codes: NDArray[np.uint8], scale: NDArray[np.float32], dtype: DTypeLike) -> Bits:
    """The bits of e2m1 codes (one per byte) times scales, elementwise; the shapes broadcast."""
    bits = _products(_E2M1[codes & 7], scale, dtype)
    width = 8 * bits.dtype.itemsize
    return bits ^ ((codes >> 3).astype(bits.dtype) << bits.dtype.type(width - 1))


@functools.cache
def e4m3_e8m0_table(dtype: np.dtype[Any]) -> Bits:
    """:func:`e4m3_table` of all E8M0 bytes: uint16 or uint32 ``[256 scale bytes, 256 codes]``. Read-only, kept."""
    table = e4m3_table(e8m0_values(np.arange(256, dtype=np.uint8)), dtype)
    table.flags.writeable = False
    return table


@functools.cache
def e2m1_e8m0_pairs(dtype: np.dtype[Any]) -> Bits:
    """The two elements of every packed byte under every E8M0 scale: uint32 or uint64 ``[256 scale bytes, 256]``.

    The low half of a word is the even element, so a row of words is a row of elements in little-endian memory.
    Read-only, kept.
    """
    scale = e8m0_values(np.arange(256, dtype=np.uint8))[:, None]
    single = e2m1_products(np.arange(16, dtype=np.uint8), scale, dtype)
    word = np.dtype(f"u{2 * single.dtype.itemsize}")
    byte = np.arange(256)
    # np.take, unlike indexing, leaves each scale's row in one piece; the loops are half as fast without.
    low, high = (np.take(single.astype(word), nibble, axis=1) for nibble in (byte & 15, byte >> 4))
    table = low | (high << word.type(word.itemsize * 4))
    table.flags.writeable = False
    return table
