"""Tensors that are stored unquantised: change of floating dtype and orientation in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dsv4_convert.errors import BadInput
from dsv4_convert.formats.checks import destination, read_only
from dsv4_convert.formats.tables import BFLOAT16, FLOAT32

Array = NDArray[Any]

_CASTS = {(BFLOAT16, FLOAT32), (FLOAT32, BFLOAT16)}


def cast_plain(array: Array, *, dtype: DTypeLike, transpose: bool = False, out: Array | None = None) -> Array:
    """A copy of ``array`` in ``dtype``, transposed if asked.

    bfloat16 -> float32 is exact, NaN payloads included. float32 -> bfloat16 rounds to nearest even, overflows to
    infinity, and turns a NaN into the quiet NaN of its sign. Every other dtype is copied and must be asked for by its
    own name: an integer never becomes a float.

    Args:
        array: any shape; ``[R, C]`` with ``transpose``. Not changed.
        dtype: of the result.
        transpose: write ``[C, R]``.
        out: C-contiguous buffer of the result's shape and dtype, for example a slice of a stack.

    Raises:
        BadInput: ``dtype`` is neither the array's own nor reached by a cast between bfloat16 and float32.
        ValueError: ``out`` does not fit, or ``transpose`` of something that is not a matrix.
    """
    wanted = np.dtype(dtype)
    if wanted != array.dtype and (array.dtype, wanted) not in _CASTS:
        raise BadInput(f"plain tensor: expected {wanted}, or bfloat16 or float32 to cast from, found {array.dtype}")
    if transpose and array.ndim != 2:
        raise ValueError(f"only a matrix can be transposed, found shape {array.shape}")
    result = destination(out, shape=array.shape[::-1] if transpose else array.shape, dtype=wanted)
    if wanted == array.dtype and (not transpose or wanted.itemsize > 4):
        np.copyto(result, array.T if transpose else array)
        return result
    from dsv4_convert.formats import kernels

    action = kernels.COPY
    if wanted != array.dtype:
        action = kernels.WIDEN if wanted == FLOAT32 else kernels.NARROW
    source = np.require(array, requirements=["C_CONTIGUOUS", "ALIGNED"])
    source_bits = read_only(source.view(f"u{source.dtype.itemsize}"))
    result_bits = result.view(f"u{result.dtype.itemsize}")
    if transpose and source.dtype.itemsize == 1:
        kernels.transpose_bytes(source_bits, result_bits)
    elif transpose:
        kernels.convert_columns(source_bits, result_bits, action)
    else:
        kernels.convert(source_bits.reshape(-1), result_bits.reshape(-1), action)
    return result
