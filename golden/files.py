"""The files of a golden, in a folder or behind a URL; of the latter only the parts that are read are fetched."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from dsv4_convert.checkpoint.dtypes import DTYPES
from dsv4_convert.checkpoint.header import Header, TensorInfo, read_header, read_header_by_ranges
from dsv4_convert.errors import BUGS, BadInput, ResourceError, UsageError

Array = np.ndarray[Any, Any]
T = TypeVar("T")

#: Bytes that are fetched at a time, and how many such blocks of a file are kept: taps are stored and read in the order
#: of execution, so what is read next is mostly there.
_BLOCK_BYTES = 8 << 20
_BLOCKS = 4
#: Status codes of HTTP that say that there is no such file.
_ABSENT = (404, 410)
#: Seconds to wait before trying again what the network did not give.
_WAITS = (1, 4)
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
    """A prefix of a bucket, a folder of a web server or of a Hub repository, through fsspec."""

    def __init__(self, url: str) -> None:
        """Nothing is fetched yet.

        Raises:
            UsageError: a protocol that fsspec does not know, or whose package is not installed.
        """
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        try:
            self._system, root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{url}: {error}; expected a folder, or a URL such as gs://… or https://…") from None
        self._url, self._root = url.rstrip("/"), root.rstrip("/")
        self._open: tuple[str, Any] | None = None

    def content(self, name: str) -> bytes | None:
        """All of a small file; None if there is no such file. Raises :class:`ResourceError`."""
        try:
            return self._persistently(name, lambda: bytes(self._system.cat_file(f"{self._root}/{name}")))
        except FileNotFoundError:
            return None

    def header(self, name: str) -> Header:
        """The checked header of a safetensors file. Raises :class:`BadInput`, :class:`ResourceError`."""
        try:
            size = self._persistently(name, lambda: self._system.size(f"{self._root}/{name}"))
            if size is None:
                raise ResourceError(
                    f"{self._url}/{name}: the server does not state its size. Goldens are read by ranges of plain "
                    "files: turn compression and chunked transfer off there, or download the folder and give its path."
                )
            return read_header_by_ranges(Path(name), size, lambda start, stop: self._read(name, start, stop))
        except FileNotFoundError:
            raise BadInput(f"{self._url}/{name}: missing; {AGAIN}") from None
        except BadInput as error:
            raise BadInput(f"{self._url}/{error}") from None

    def array(self, name: str, info: TensorInfo) -> Array:
        """One tensor. Raises :class:`BadInput`, :class:`ResourceError`."""
        raw = np.frombuffer(self._read(name, info.start, info.start + info.nbytes), np.uint8)
        return _as_array(raw, info, f"{self._url}/{name}")

    def _read(self, name: str, start: int, stop: int) -> bytes:
        return self._persistently(name, lambda: self._part(name, start, stop))

    def _part(self, name: str, start: int, stop: int) -> bytes:
        if self._open is None or self._open[0] != name:
            options = {"block_size": _BLOCK_BYTES, "cache_type": "blockcache", "cache_options": {"maxblocks": _BLOCKS}}
            self._open = (name, self._system.open(f"{self._root}/{name}", "rb", **options))
        stream = self._open[1]
        stream.seek(start)
        return bytes(stream.read(stop - start))

    def _persistently(self, name: str, attempt: Callable[[], T]) -> T:
        """Try what the network may refuse now and then; an absent file is raised as it is."""
        where = f"{self._url}/{name}"
        for wait in (*_WAITS, None):
            try:
                return attempt()
            except ValueError as error:
                raise ResourceError(
                    f"{where}: {error}. Goldens are read by ranges: download the folder and give its path, or serve it "
                    "from a server that has them."
                ) from None
            except BUGS:
                raise
            except Exception as error:  # what fsspec's implementations raise has no common class
                if _is_absence(error):
                    raise
                self._open = None
                if wait is None:
                    reason = error.__cause__ or error or type(error).__name__
                    raise ResourceError(
                        f"{where}: cannot be read ({reason}); check network and permissions, then run the same command "
                        "again"
                    ) from error
                time.sleep(wait)
        raise AssertionError("unreachable")


def _is_absence(error: Exception) -> bool:
    """Whether a file is not there. Over HTTP fsspec says so of whatever kept it from asking, and adds the cause."""
    cause = error.__cause__
    known = cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in _ABSENT
    return isinstance(error, FileNotFoundError) and known


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
