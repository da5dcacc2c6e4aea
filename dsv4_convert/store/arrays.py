"""One array in one folder: created and written chunk by chunk, and read back by rows.

An array's metadata and its uncompressed chunks are plain files (see :mod:`.layout`), written and read directly.
Compressed chunks go through tensorstore, which is imported only then.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import mmap
import operator
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from dsv4_convert.errors import BUGS, BadInput, ResourceError
from dsv4_convert.files.strict_json import parse_object
from dsv4_convert.files.writing import writing
from dsv4_convert.store.layout import ARRAY_METADATA_FILE, DTYPES, ArrayLayout, Index, Region, chunk_file, raw_bytes

Compression: TypeAlias = Literal["none", "zstd"]
Array: TypeAlias = np.ndarray[Any, Any]

_COMPRESSORS: dict[Compression, dict[str, Any] | None] = {
    "none": None,
    "zstd": {"id": "zstd", "level": 1},  # what Orbax asks for
}


def _zarr_name(dtype: np.dtype[Any]) -> str:
    """Zarr's name of a dtype: NumPy's type string, and for the ml_dtypes, which have none, their name."""
    return dtype.name if dtype.kind == "V" else dtype.str


_ZARR_DTYPES = {_zarr_name(dtype): dtype for dtype in DTYPES.values()}
_DIRECT_FROM = 1 << 20
_MAX_WRITE = 1 << 30  # Linux writes at most 2 GiB - 4 KiB per call


def is_local(path: object) -> bool:
    """Whether a path is one of this machine, not of a bucket, whose type is not pathlib's."""
    return isinstance(path, Path)


def write_file(path: Path, data: bytes | memoryview, *, size: int | None = None) -> None:
    """Write ``data``, extended by zeros to ``size`` bytes, and wait until it is on the disk.

    Large data in page-aligned memory go past the page cache where the file system allows it: copying them into the
    cache costs a core more time than decoding and hashing them.

    Raises:
        ResourceError: the disk is full, read-only or failing.
    """
    view = memoryview(data)
    pages = len(view) - len(view) % mmap.PAGESIZE
    with writing(path):
        descriptor, direct = _open_for(path, direct=pages >= _DIRECT_FROM and _is_page_aligned(view))
        try:
            if direct:
                _write_all(descriptor, view[:pages])
                fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
                view = view[pages:]
            _write_all(descriptor, view)
            if size is not None:
                os.ftruncate(descriptor, size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _open_for(path: Path, *, direct: bool) -> tuple[int, bool]:
    """A descriptor of a new file, and whether it is past the page cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    if direct:
        try:
            return os.open(path, flags | os.O_DIRECT, 0o666), True
        except OSError as error:
            if error.errno != errno.EINVAL:  # this file system has no such thing
                raise
    return os.open(path, flags, 0o666), False


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view[:_MAX_WRITE]) :]


def _is_page_aligned(view: memoryview) -> bool:
    return hasattr(os, "O_DIRECT") and np.frombuffer(view, np.uint8).ctypes.data % mmap.PAGESIZE == 0


def create_array(folder: Path, layout: ArrayLayout, compression: Compression) -> None:
    """Make ``folder``, which must not exist, an array without chunks.

    Raises:
        ResourceError: the disk is full, read-only or failing.
    """
    with writing(folder):
        folder.mkdir()
    write_file(folder / ARRAY_METADATA_FILE, array_metadata(layout, compression))


def array_metadata(layout: ArrayLayout, compression: Compression) -> bytes:
    """The content of an array's metadata file, byte for byte as tensorstore writes it for Orbax."""
    document = {
        **_FIXED,
        "chunks": layout.chunk_shape,
        "compressor": _COMPRESSORS[compression],
        "dtype": _zarr_name(layout.dtype),
        "shape": layout.shape,
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def encoded_chunk(layout: ArrayLayout, compression: Compression, index: Index, chunk: Array) -> bytes:
    """A chunk as a file; ``chunk`` as for :meth:`ArrayWriter.write_chunk`."""
    if compression == "none":
        return bytes(raw_bytes(_padded(layout, chunk))).ljust(layout.chunk_nbytes, b"\0")
    array, files = _in_memory(layout, compression)
    array[layout.chunk_region(index)].write(chunk).result()
    return bytes(files.read(chunk_file(index)).result().value)


def _in_memory(layout: ArrayLayout, compression: Compression) -> tuple[Any, Any]:
    """An array of tensorstore's that lies in memory, and the store of its files."""
    import tensorstore as ts

    context = ts.Context()
    spec = {**_spec(Path("array"), layout, compression), "kvstore": {"driver": "memory", "path": "array/"}}
    array = ts.open(spec, create=True, context=context).result()
    files = ts.KvStore.open({"driver": "memory", "path": "array/"}, context=context).result()
    return array, files


def _padded(layout: ArrayLayout, chunk: Array) -> Array:
    """The chunk, extended by zeros in all axes but the first to the full size."""
    if chunk.shape[1:] == layout.chunk_shape[1:]:
        return chunk
    padded = np.zeros((*chunk.shape[:1], *layout.chunk_shape[1:]), layout.dtype)
    padded[tuple(map(slice, chunk.shape))] = chunk
    return padded


class ArrayWriter:
    """Writes chunks of the array in ``folder``, made by :func:`create_array`. Threads and processes may write at once.

    Memory: an uncompressed chunk is written from the caller's buffer; only a chunk that is clipped in an axis other
    than the first is copied for padding. A compressed chunk is copied once by tensorstore.
    """

    def __init__(self, folder: Path, layout: ArrayLayout, compression: Compression) -> None:
        self._folder = folder
        self._layout = layout
        self._compression = compression

    @cached_property
    def _array(self) -> Any:
        import tensorstore as ts

        return ts.open(_spec(self._folder, self._layout, self._compression)).result()

    def write_chunk(self, index: Index, chunk: Array) -> None:
        """Write chunk ``index`` durably; ``chunk`` is C-contiguous, of the layout's dtype and the clipped shape."""
        if self._compression != "none":
            with _tensorstore_writing(self._folder):
                self._array[self._layout.chunk_region(index)].write(chunk).result()
            return
        whole = raw_bytes(_padded(self._layout, chunk))
        write_file(self._folder / chunk_file(index), whole, size=self._layout.chunk_nbytes)


@dataclass(frozen=True, kw_only=True)
class StoredArray:
    """An array on disk, opened by its metadata; reading is stateless, so threads may share it."""

    folder: Path
    layout: ArrayLayout
    compression: Compression

    @classmethod
    def open(cls, folder: Path) -> StoredArray:
        """Read the metadata of the array in ``folder``.

        Raises:
            BadInput: the metadata is absent, is not JSON, or describes something that this store does not write.
        """
        path = folder / ARRAY_METADATA_FILE
        try:
            document = parse_object(path.read_bytes(), where=str(path))
            return cls(folder=folder, **_parse_metadata(document))
        except OSError as error:
            raise BadInput(f"{path}: the array's metadata cannot be read: {error.strerror}") from error
        except (ValueError, KeyError) as error:
            raise BadInput(f"{path}: not the metadata of an array of this store: {error}") from error

    def missing_chunks(self) -> list[str]:
        """Names of chunk files that are absent or, when uncompressed, of another size than the layout says."""
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self.folder)}
        names = map(chunk_file, self.layout.chunk_indices())
        if self.compression != "none":
            return [name for name in names if name not in sizes]
        return [name for name in names if sizes.get(name) != self.layout.chunk_nbytes]

    def read_rows(self, start: int, stop: int) -> Array:
        """Rows ``start:stop`` of the first axis; a scalar is read with ``0, 1`` and comes without that axis.

        Raises:
            BadInput: as :meth:`read_region`.
        """
        shape = self.layout.shape
        return self.read_region((slice(start, stop), *map(slice, (0,) * (len(shape) - 1), shape[1:]))[: len(shape)])

    def read_region(self, region: Region) -> Array:
        """A part of the array: one slice with a start and a stop inside it, and no step, for every axis.

        Reads only the bytes concerned of uncompressed chunks. Memory: the result, and a compressed chunk.

        Raises:
            BadInput: a chunk is absent, shorter than it should be, or does not decompress.
        """
        out = np.empty([part.stop - part.start for part in region], self.layout.dtype)
        for index in self.layout.chunks_of_region(region):
            chunk = self.layout.chunk_region(index)
            both = [
                (max(part.start, own.start), min(part.stop, own.stop)) for part, own in zip(region, chunk, strict=True)
            ]
            # The ellipsis keeps a scalar an array.
            place: tuple[Any, ...] = (*_less(both, region), ...)
            target = out[place]
            inside = _less(both, chunk)
            if self.compression == "none":
                self._read_runs(index, inside, target, whole=out.shape)
            else:
                target[...] = self.read_chunk(index)[inside]
        return out

    def _read_runs(self, index: Index, inside: Region, target: Array, *, whole: tuple[int, ...]) -> None:
        """Fill ``target``, a part of an array of the shape ``whole``, with a part of an uncompressed chunk.

        From some axis on a part follows itself both in the file and in memory: that is read at once.
        """
        full = self.layout.chunk_shape
        axis = max((at for at, size in enumerate(target.shape) if not size == full[at] == whole[at]), default=0)
        strides = [math.prod(full[at + 1 :]) * self.layout.dtype.itemsize for at in range(len(full))]
        first = sum(part.start * stride for part, stride in zip(inside, strides, strict=True))
        runs = (
            (raw_bytes(target[(*at, ...)]), first + sum(map(operator.mul, at, strides)))
            for at in np.ndindex(target.shape[:axis])
        )
        self._read_bytes(index, runs)

    def read_chunk(self, index: Index) -> Array:
        """Chunk ``index``, clipped to the array, C-contiguous.

        Raises:
            BadInput: the chunk is absent, of another size, or does not decompress.
        """
        if self.compression == "none":
            inside: tuple[Any, ...] = tuple(slice(size) for size in self.layout.clipped_shape(index))
            clipped: Array = self._read_padded_chunk(index)[(*inside, ...)]  # the ellipsis keeps a scalar an array
            return np.asarray(clipped, order="C")
        import tensorstore as ts

        try:
            if is_local(self.folder):
                stored = ts.open(_spec(self.folder, self.layout, self.compression)).result()
            else:
                stored, files = _in_memory(self.layout, self.compression)
                files.write(chunk_file(index), (self.folder / chunk_file(index)).read_bytes()).result()
            chunk = stored[self.layout.chunk_region(index)].read().result()
        except BUGS:
            raise
        except Exception as error:  # tensorstore raises ValueError, OSError and its own kinds alike
            raise BadInput(f"{self.folder / chunk_file(index)}: the chunk cannot be read: {error}") from error
        return np.asarray(chunk, order="C")

    def padding_is_damaged(self, index: Index) -> bool:
        """Whether an uncompressed chunk has anything but zeros outside the array; raises as :meth:`read_chunk`."""
        clipped = self.layout.clipped_shape(index)
        if self.compression != "none" or clipped == self.layout.chunk_shape:
            return False
        padding = self._read_padded_chunk(index).view(np.uint8)
        padding[(*map(slice, clipped[:-1]), slice(clipped[-1] * self.layout.dtype.itemsize))] = 0
        return bool(padding.any())

    def _read_padded_chunk(self, index: Index) -> Array:
        chunk = np.empty(self.layout.chunk_shape, self.layout.dtype)
        self._read_bytes(index, [(raw_bytes(chunk), 0)])
        return chunk

    def _read_bytes(self, index: Index, runs: Iterable[tuple[memoryview, int]]) -> None:
        """Fill buffers with the bytes of an uncompressed chunk from some offsets on."""
        path = self.folder / chunk_file(index)
        try:
            with path.open("rb", buffering=0) if is_local(path) else path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                if size != self.layout.chunk_nbytes:
                    raise BadInput(f"{path}: {size:,} bytes, expected {self.layout.chunk_nbytes:,}: damaged copy?")
                for into, offset in runs:
                    file.seek(offset)
                    while into:
                        count = file.readinto(into)
                        if not count:
                            raise BadInput(f"{path}: the file became shorter while it was read")
                        into = into[count:]
        except OSError as error:
            raise BadInput(f"{path}: the chunk cannot be read: {error.strerror}") from error


def _spec(folder: Path, layout: ArrayLayout, compression: Compression) -> dict[str, Any]:
    """The tensorstore spec that Orbax builds for the same array (compared with Orbax's own files in the tests)."""
    return {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(folder)},
        "metadata": {
            "shape": layout.shape,
            "chunks": layout.chunk_shape,
            "compressor": _COMPRESSORS[compression],
        },
        "dtype": layout.dtype.name,
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }


def _less(bounds: Iterable[tuple[int, int]], region: Region) -> Region:
    """Bounds inside an array as slices of a region of it."""
    return tuple(slice(low - part.start, high - part.start) for (low, high), part in zip(bounds, region, strict=True))


#: The metadata that all arrays share.
_FIXED = {"zarr_format": 2, "order": "C", "filters": None, "fill_value": None, "dimension_separator": "."}
#: Everything that an array says of itself.
METADATA_KEYS = frozenset((*_FIXED, "compressor", "dtype", "shape", "chunks"))


def _parse_metadata(document: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in _FIXED.items():
        if document[key] != value or isinstance(document[key], bool):
            raise ValueError(f"{key} is {document[key]!r}, expected {value!r}")
    compression = next((name for name, value in _COMPRESSORS.items() if value == document["compressor"]), None)
    if compression is None:
        raise ValueError(f"compressor {document['compressor']!r} is not one of {list(_COMPRESSORS.values())}")
    if not isinstance(document["dtype"], str) or document["dtype"] not in _ZARR_DTYPES:
        raise ValueError(f"dtype {document['dtype']!r} is not one of {', '.join(_ZARR_DTYPES)}")
    for key in ("shape", "chunks"):
        if not isinstance(document[key], list) or any(type(size) is not int for size in document[key]):
            raise ValueError(f"{key} is {document[key]!r}, expected a list of integers")
    layout = ArrayLayout(
        shape=tuple(document["shape"]),
        dtype=_ZARR_DTYPES[document["dtype"]],
        chunk_shape=tuple(document["chunks"]),
    )
    return {"layout": layout, "compression": compression}


@contextmanager
def _tensorstore_writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except BUGS:
        raise
    except Exception as error:  # a full disk is a ValueError here: tensorstore maps its own status codes
        raise ResourceError(
            f"{folder}: cannot write: {error}. Finished work is kept; "
            "make room (or fix the cause) and run the same command again."
        ) from error
