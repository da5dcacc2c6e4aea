"""The files of a golden, in a folder or behind a URL; of the latter only the parts that are read are fetched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsv4_convert.checkpoint.dtypes import DTYPES
from dsv4_convert.checkpoint.header import Header, TensorInfo, read_header, read_header_by_ranges
from dsv4_convert.checkpoint.locate import open_remote
from dsv4_convert.errors import BadInput

Array = np.ndarray[Any, Any]

#: Bytes that are fetched at a time, and how many such blocks of a file are kept: taps are stored and read in the order
#: of execution, so what is read next is mostly there.
_BLOCK_BYTES = 8 << 20
_BLOCKS = 4
AGAIN = "take the golden again from where it was recorded, or record it again"


class Files(Protocol):
    """The files of one golden by name."""

    def content(self, name: str) -> bytes | None:
        """All of a small file; None if there is no such file."""

    def header(self, name: str) -> Header:
        """The checked header of a safetensors file."""

    def array(self, name: str, info: TensorInfo) -> Array:
        """One tensor of the file ``name``."""


class LocalFiles:
    """A folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def content(self, name: str) -> bytes | None:
        """All of a small file; None if there is no such file. Raises :class:`BadInput` if it cannot be read."""
        file = self._root / name
        if not file.is_file():
            return None
        try:
            return file.read_bytes()
        except OSError as error:
            raise BadInput(f"{file}: cannot be read ({error.strerror}); check its permissions") from None

    def header(self, name: str) -> Header:
        """The checked header of a safetensors file. Raises :class:`BadInput`."""
        return read_header(self._root / name)

    def array(self, name: str, info: TensorInfo) -> Array:
        """One tensor, copied into memory. Raises :class:`BadInput`."""
        return read_array(info)


class RemoteFiles:
    """A prefix of a bucket, a folder of a web server or of a Hub repository."""

    def __init__(self, url: str) -> None:
        """Nothing is fetched yet. Raises :class:`UsageError`: not a URL that is supported."""
        self._folder = open_remote(url)
        #: Its URL as it is shown.
        self.url = self._folder.url
        self._sizes: dict[str, int] = {}
        self._block = lru_cache(_BLOCKS)(self._fetch_block)

    def content(self, name: str) -> bytes | None:
        """All of a small file; None if there is no such file. Raises :class:`BadInput`, :class:`ResourceError`."""
        return self._folder.content(name)

    def header(self, name: str) -> Header:
        """The checked header of a safetensors file. Raises :class:`BadInput`, :class:`ResourceError`."""
        with self._present(name):
            self._sizes[name] = size = self._folder.size(name)
            try:
                return read_header_by_ranges(Path(name), size, lambda start, stop: self._folder.read(name, start, stop))
            except BadInput as error:
                raise BadInput(f"{self.url}/{error}") from None

    def array(self, name: str, info: TensorInfo) -> Array:
        """One tensor. Raises :class:`BadInput`, :class:`ResourceError`."""
        first, end = info.start // _BLOCK_BYTES, -(-info.end // _BLOCK_BYTES)
        with self._present(name):
            blocks = b"".join(self._block(name, number) for number in range(first, end))
        raw = np.frombuffer(blocks, np.uint8)[info.start - first * _BLOCK_BYTES :][: info.nbytes]
        return _as_array(raw, info, f"{self.url}/{name}")

    def _fetch_block(self, name: str, number: int) -> bytes:
        start = number * _BLOCK_BYTES
        return self._folder.read(name, start, min(start + _BLOCK_BYTES, self._sizes[name]))

    @contextmanager
    def _present(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise BadInput(f"{self.url}/{name}: missing; {AGAIN}") from None


def read_array(info: TensorInfo) -> Array:
    """The array of one tensor of a local file, copied into memory.

    Raises:
        BadInput: the file cannot be read, or is shorter than it was when its header was read.
    """
    try:
        raw = np.fromfile(info.file, np.uint8, count=info.nbytes, offset=info.start)
    except OSError as error:
        raise BadInput(f"{info.file}: cannot be read ({error.strerror}); check its permissions and the disk") from None
    return _as_array(raw, info, str(info.file))


def _as_array(raw: Array, info: TensorInfo, where: str) -> Array:
    """Bytes as the tensor that they are."""
    if len(raw) != info.nbytes:
        raise BadInput(f"{where}: {info.name}: {info.nbytes} bytes expected, found {len(raw)}; {AGAIN}")
    return raw.view(DTYPES[info.dtype].array).reshape(info.shape)
