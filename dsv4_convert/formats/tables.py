"""The values of codes and scales, and the definition of their product.

The product is the float32 product of code and scale, for bfloat16 rounded again to nearest even: what torch computes
with ``(codes.float() * scale.float()).to(dtype)``. With an E8M0 scale the first product is exact or infinite, so the
result is the exact product rounded once.

This module fixes two things that IEEE 754 leaves open. The sign of every result, zeros and NaN included, is the product
of the signs of code and scale. A NaN is the quiet NaN without payload (0x7FC0 or 0x7FC00000 and the sign).
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from dsv4_convert.errors import Dsv4Error

Bits = NDArray[np.unsignedinteger[Any]]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)

#: Magnitudes of e4m3fn, by the seven bits below the sign; the last one is NaN.
E4M3 = np.arange(128, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)

#: Magnitudes of e2m1, by the three bits below the sign.
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)

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


def refuse_flushing() -> None:
    """Check that floats are not flushed; call it before products are computed.

    Raises:
        Dsv4Error: this thread flushes subnormal floats to zero, so the products would be wrong.
    """
    if np.float32(2.0**-126) * np.float32(0.5) == 0:
        raise Dsv4Error(
            "this thread flushes subnormal floats to zero, which changes small weights: expected IEEE 754 arithmetic. "
            "A library built with -ffast-math or torch.set_flush_denormal(True) does that; convert without it"
        )


def products(magnitudes: NDArray[np.float32], scale: NDArray[np.float32], dtype: DTypeLike) -> Bits:
    """The bits of ``magnitudes * scale`` with the sign of the scale, uint16 or uint32; the shapes broadcast.

    Raises:
        Dsv4Error: as :func:`refuse_flushing`.
    """
    refuse_flushing()
    with np.errstate(over="ignore", invalid="ignore"):
        product = magnitudes * np.abs(scale)
    bits = np.where(np.isnan(product), np.uint32(_QUIET_NAN), product.view(np.uint32))
    bits |= np.signbit(scale).astype(np.uint32) << np.uint32(31)
    if bits_dtype(dtype) == np.uint32:
        return bits
    # To nearest even on the 16 bits that go. A carry out of the largest finite number gives infinity, as it should.
    bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits >> np.uint32(16)).astype(np.uint16)
