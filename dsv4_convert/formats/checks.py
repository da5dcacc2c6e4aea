"""Checks of the codecs' arguments: codes as bytes of several dtypes, scales of two kinds, output buffers."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from dsv4_convert.errors import BadInput

Array = NDArray[Any]

E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
#: Bytes at whose multiples XLA on CPU wants arrays to begin; NumPy's begin at multiples of 16.
_ALIGNMENT = 64
_PLAIN_BYTES = (np.dtype(np.uint8), np.dtype(np.int8))


def read_only(array: Array) -> Array:
    """A view that cannot be written, so that numba does not compile a kernel twice, for writable and mapped inputs."""
    view = array.view()
    view.flags.writeable = False
    return view


def as_codes(array: Array, *, what: str, native: DTypeLike | None = None) -> NDArray[np.uint8]:
    """The bytes of a matrix of codes as read-only uint8 ``[R, C]``; a copy only where the rows are not contiguous.

    Raises:
        BadInput: not a matrix, or neither uint8, int8 nor the dtype ``native`` of the same bytes.
    """
    known = _PLAIN_BYTES if native is None else (*_PLAIN_BYTES, np.dtype(native))
    if array.ndim != 2 or array.dtype not in known:
        names = ", ".join(dtype.name for dtype in known)
        raise BadInput(f"{what} codes: expected a matrix of {names}, found {array.dtype} {array.shape}")
    return read_only(np.ascontiguousarray(array).view(np.uint8))


def as_scale(scale: Array, *, what: str, codes: tuple[int, int], block: tuple[int, int]) -> Array:
    """A scale tensor as uint8 (E8M0) or float32, after a check of its shape against the decoded shape ``codes``.

    Raises:
        BadInput: another dtype, or not one scale per block, with the last block of a row or column cut off.
    """
    if scale.dtype not in (*_PLAIN_BYTES, E8M0, np.float32):
        raise BadInput(f"{what} scale: expected E8M0 ({E8M0.name}, uint8) or float32, found {scale.dtype}")
    expected = tuple(-(-size // step) for size, step in zip(codes, block, strict=True))
    if scale.shape != expected:
        raise BadInput(
            f"{what} scale: expected shape {expected} for a weight {codes} in blocks of {block[0]}x{block[1]}, "
            f"found {scale.shape}"
        )
    if scale.dtype == np.float32:
        return np.ascontiguousarray(scale)
    return np.ascontiguousarray(scale).view(np.uint8)


def positive(block: tuple[int, int]) -> tuple[int, int]:
    """The block itself; ValueError unless both sides are at least 1."""
    if min(block) < 1:
        raise ValueError(f"block is {block}; both sides must be at least 1")
    return block


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """As ``np.empty``, from an address that JAX on CPU takes without copying the array first."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + _ALIGNMENT - 1, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def destination(out: Array | None, *, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """``out`` after checks, or a new array.

    Raises:
        ValueError: ``out`` has another shape or dtype, or is not a writable, aligned, C-contiguous array.
    """
    if out is None:
        return empty_aligned(shape, dtype)
    if out.shape != shape or out.dtype != dtype:
        raise ValueError(f"out: expected {dtype} {shape}, found {out.dtype} {out.shape}")
    if not out.flags.carray:
        raise ValueError("out: expected a writable, aligned, C-contiguous array")
    return out
