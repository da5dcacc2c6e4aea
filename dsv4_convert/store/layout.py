"""How one array is cut into chunks, named on disk and hashed. No input or output.

A leaf is stored as a Zarr 2 array in C order, little-endian, in a folder named by its dotted path, which is the layout
that Orbax writes with ``use_ocdbt=False``. An uncompressed chunk file is the plain bytes of the chunk, so it can be
written without a copy and read at any offset. Chunks at the upper edge keep the full chunk size; their surplus is zero.

Digests (see :mod:`.digests`). The chunk digest is that of the chunk's canonical bytes: C order, little-endian, clipped
to the array (no padding, no compression). The leaf digest is that of the concatenated raw 32-byte chunk digests, chunks
in C order of the grid. Chunks can therefore be hashed in any order and checked one at a time; the leaf digest depends
on the chunk shape.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import ml_dtypes
import numpy as np

from dsv4_convert.folders import CONVERTED_FILE
from dsv4_convert.store.digests import digest_of

Index: TypeAlias = tuple[int, ...]
Region: TypeAlias = tuple[slice, ...]
T = TypeVar("T")

MANIFEST_FILE = CONVERTED_FILE
ARRAY_METADATA_FILE = ".zarray"
DEFAULT_CHUNK_BYTES = 64 << 20

#: Dtypes that this store accepts; each round-trips bit for bit through Orbax 0.12.8.
DTYPES: dict[str, np.dtype[Any]] = {
    dtype.name: dtype
    for dtype in map(
        np.dtype,
        (
            ml_dtypes.bfloat16,
            ml_dtypes.float8_e4m3fn,
            ml_dtypes.float8_e8m0fnu,
            "<f2",
            "<f4",
            "|u1",
            "|i1",
            "<i4",
            "<i8",
        ),
    )
}

_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_MAX_NAME = 200  # file systems allow 255 bytes per name; Orbax appends a suffix to some


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """Shape, dtype and chunk grid of one array.

    Raises:
        ValueError: a negative dimension, 2**63 bytes or more, a chunk shape of another rank or with a dimension
            below 1, a dtype outside :data:`DTYPES`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype.name not in DTYPES or DTYPES[self.dtype.name] != self.dtype:
            raise ValueError(f"dtype {self.dtype!r} cannot be stored; use one of {', '.join(DTYPES)} (little-endian)")
        if any(size < 0 for size in self.shape):
            raise ValueError(f"shape {self.shape} has a negative dimension")
        if any(size >= 1 << 63 for size in (self.nbytes, *self.shape)):
            raise ValueError(f"shape {self.shape} is larger than any file")
        if len(self.chunk_shape) != len(self.shape) or any(size < 1 for size in self.chunk_shape):
            raise ValueError(
                f"chunk shape {self.chunk_shape} does not fit shape {self.shape}: same rank and sizes >= 1"
            )

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along each axis."""
        return tuple(-(-size // chunk) for size, chunk in zip(self.shape, self.chunk_shape, strict=True))

    @property
    def chunk_count(self) -> int:
        """Number of chunks; 1 for a scalar, 0 for an array without elements."""
        return math.prod(self.grid)

    @property
    def nbytes(self) -> int:
        """Canonical bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of a full chunk, which is also the size of every uncompressed chunk file."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    def chunk_indices(self) -> Iterator[Index]:
        """Every chunk index in C order of the grid."""
        return itertools.product(*(range(count) for count in self.grid))

    def chunks_of_region(self, region: Region) -> Iterator[Index]:
        """Every chunk that holds a part of a region: one slice with a start and a stop for each axis."""
        if any(part.start >= part.stop for part in region):
            return iter(())
        return itertools.product(
            *(
                range(part.start // size, -(-part.stop // size))
                for part, size in zip(region, self.chunk_shape, strict=True)
            )
        )

    def chunk_region(self, index: Index) -> tuple[slice, ...]:
        """The part of the array that chunk ``index`` holds, clipped to the array."""
        return tuple(
            slice(at * chunk, min((at + 1) * chunk, size))
            for at, chunk, size in zip(index, self.chunk_shape, self.shape, strict=True)
        )

    def clipped_shape(self, index: Index) -> tuple[int, ...]:
        """Shape of chunk ``index`` without padding."""
        return tuple(part.stop - part.start for part in self.chunk_region(index))


def bounded(region: Region, shape: Sequence[int]) -> Region:
    """Slices with starts and stops. Raises :class:`ValueError` for a step, or another number of axes."""
    bounds = [part.indices(size) for part, size in zip(region, shape, strict=True)]
    if any(step != 1 for *_, step in bounds):
        raise ValueError(f"slices must have step 1, got {region}")
    return tuple(slice(start, max(start, stop)) for start, stop, _ in bounds)


def row_chunks(shape: Sequence[int], dtype: np.dtype[Any], *, limit: int = DEFAULT_CHUNK_BYTES) -> tuple[int, ...]:
    """Chunk shape that splits only the first axis, into equal parts of at most ``limit`` bytes (at least one row).

    The parts are balanced, so that the last chunk wastes as little padding as possible.
    """
    if not shape:
        return ()
    rows = max(1, shape[0])
    tail = tuple(max(1, size) for size in shape[1:])
    rows_in_limit = max(1, limit // (math.prod(tail) * dtype.itemsize))
    parts = -(-rows // rows_in_limit)
    return (-(-rows // parts), *tail)


def chunk_file(index: Index) -> str:
    """File name of a chunk inside the leaf's folder, as Zarr 2 names it: ``3.0.0``, and ``0`` for a scalar."""
    return ".".join(map(str, index)) or "0"


def raw_bytes(array: np.ndarray[Any, Any]) -> memoryview:
    """The bytes of a C-contiguous array of any dtype, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def chunk_digest(array: np.ndarray[Any, Any], *, like: str | None = None) -> str:
    """The digest of the canonical bytes of a C-contiguous chunk; ``like`` as for :class:`~.digests.Hasher`."""
    return digest_of(raw_bytes(array), like=like)


def is_leaf_path(path: str) -> bool:
    """Whether ``path`` is a dotted path of words, safe as a folder name and unambiguous when split at the dots."""
    return len(path) <= _MAX_NAME and _PATH.fullmatch(path) is not None


def is_file_name(name: str) -> bool:
    """Whether ``name`` can be a file beside the leaves: one plain name, no folder, not hidden."""
    return len(name) <= _MAX_NAME and _FILE_NAME.fullmatch(name) is not None


def nested(leaves: Mapping[str, T]) -> dict[str, Any]:
    """The tree of dotted paths: ``{"a.b": x}`` becomes ``{"a": {"b": x}}``. The paths must have no problems."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def path_problems(paths: Sequence[str]) -> list[str]:
    """Reasons why ``paths`` form no tree: bad names, duplicates, a leaf that is also a folder of leaves."""
    problems = [f"{path!r} is not a dotted path of letters, digits and '_'" for path in paths if not is_leaf_path(path)]
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            problems.append(f"{path!r} occurs twice")
        seen.add(path)
    for path in sorted(seen):
        parts = path.split(".")
        parents = (".".join(parts[:length]) for length in range(1, len(parts)))
        problems.extend(f"{path!r} lies below {parent!r}, which is a leaf" for parent in parents if parent in seen)
    return problems
