"""The one table of stored dtypes: how safetensors spells them, how wide they are, and how they look in memory."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

if sys.byteorder != "little":  # safetensors is little-endian, and reading is a view on the file's bytes
    raise ImportError("dsv4 reads checkpoints without copying and so needs a little-endian machine")


@dataclass(frozen=True, kw_only=True)
class StoredDtype:
    """Width and in-memory form of one safetensors dtype.

    Attributes:
        bits: bits per element of the shape that the header states.
        array: dtype of the array that a read gives. ``F4`` has no array type of its own: it is read as ``uint8``, two
            elements per byte along the last axis, the even element in the low nibble.
    """

    bits: int
    array: np.dtype[Any]


def _whole_bytes(array: Any) -> StoredDtype:
    dtype = np.dtype(array)
    return StoredDtype(bits=8 * dtype.itemsize, array=dtype)


#: safetensors spelling -> storage. A spelling that is not here is refused by the reader and by the writer.
DTYPES: Mapping[str, StoredDtype] = MappingProxyType(
    {
        "BOOL": _whole_bytes(np.bool_),
        "U8": _whole_bytes(np.uint8),
        "I8": _whole_bytes(np.int8),
        "U16": _whole_bytes(np.uint16),
        "I16": _whole_bytes(np.int16),
        "U32": _whole_bytes(np.uint32),
        "I32": _whole_bytes(np.int32),
        "U64": _whole_bytes(np.uint64),
        "I64": _whole_bytes(np.int64),
        "F4": StoredDtype(bits=4, array=np.dtype(np.uint8)),
        "F8_E4M3": _whole_bytes(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": _whole_bytes(ml_dtypes.float8_e5m2),
        "F8_E8M0": _whole_bytes(ml_dtypes.float8_e8m0fnu),
        "BF16": _whole_bytes(ml_dtypes.bfloat16),
        "F16": _whole_bytes(np.float16),
        "F32": _whole_bytes(np.float32),
        "F64": _whole_bytes(np.float64),
    }
)


def array_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the array that a read gives: the header's shape, with the last axis halved for ``F4``."""
    return (*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape
