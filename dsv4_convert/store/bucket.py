"""A destination in a bucket, such as ``gs://bucket/model``, through etils.epath.

An object appears whole or not at all, but nothing can be renamed, and nothing appended to. Arrays are written where
they will stay; journal and lock are objects beside them; the manifest, which makes the rest a checkpoint
to dsv4, and Orbax's ``commit_success.txt``, which does so to Orbax, come last::

    gs://bucket/model/LEAF/CHUNK              arrays
    gs://bucket/model.dsv4-partial/lock       who writes
    gs://bucket/model.dsv4-partial/journal*   what is finished, a new object every few seconds

A kill costs what was written since the last journal object. The lock is an object that the bucket makes only where none
is (a precondition on its generation), so one of two runs gets it. A killed process leaves its lock: another run
says whose it is. What is not known from here: how real buckets answer under load; tests use a file system in memory.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from dsv4_convert.errors import BUGS, ResourceError, UsageError
from dsv4_convert.files.remote import BucketFolder
from dsv4_convert.files.workspace import SUFFIX
from dsv4_convert.store.arrays import Array, Compression, array_metadata, encoded_chunk, write_file
from dsv4_convert.store.destination import AnyPath, ChunkWriter, timed_writes
from dsv4_convert.store.journal import Journal
from dsv4_convert.store.layout import ARRAY_METADATA_FILE, MANIFEST_FILE, ArrayLayout, Index, chunk_file
from dsv4_convert.store.orbax_metadata import orbax_files

_SCHEME = "gs://"
#: Written last, in this order.
_LAST = (MANIFEST_FILE, "commit_success.txt")
_FLUSH_SECONDS, _FLUSH_LINES = 5.0, 1000


def bucket_path(url: str) -> AnyPath:
    """The path of a URL.

    Raises:
        UsageError: not one of Google Cloud Storage, or gcsfs is not installed.
        ResourceError: the bucket cannot be reached.
    """
    if not url.startswith(_SCHEME):
        raise UsageError(f"{url}: not a URL of a bucket, such as {_SCHEME}bucket/model")
    from etils import epath  # type: ignore[import-untyped]

    try:
        path = epath.Path(url)
        path.exists()
    except ImportError as error:
        raise UsageError(f"{url}: {error}: pip install 'dsv4-convert[gs]'") from error
    except BUGS:
        raise
    except Exception as error:
        raise ResourceError(f"{url}: cannot be reached: {error}") from error
    return path


@contextmanager
def _uploading(path: AnyPath) -> Iterator[None]:
    """Turn what the bucket's library raises into a :class:`ResourceError` that says how to go on."""
    try:
        yield
    except BUGS:
        raise
    except Exception as error:
        raise ResourceError(
            f"{path}: cannot write: {error}. Finished work is kept; fix the cause and run the same command again."
        ) from error


@dataclass
class _BucketJournal(Journal):
    """A journal of objects: lines are collected, and become one more object every few seconds."""

    _lines: list[bytes] = field(default_factory=list)
    _flushed: float = 0.0
    _count: int = 0

    @classmethod
    def open(cls, folder: Path, *, plan: Mapping[str, Any], member: int = 0) -> Self:
        journal = super().open(folder, plan=plan, member=member)
        journal._count = len(journal._files())
        return journal

    def rewrite(self) -> None:
        whole = self.folder / "journal.jsonl"
        with _uploading(whole):
            whole.write_bytes(self.whole())
            for file in self._files():
                if file != whole:
                    file.unlink()

    @contextmanager
    def appending(self) -> Iterator[None]:
        self._lines, self._flushed = [], time.monotonic()
        try:
            yield
        finally:
            self._flush()

    def _append(self, line: bytes) -> None:
        self._lines.append(line)
        if len(self._lines) >= _FLUSH_LINES or time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        if self._lines:
            file = self.folder / f"journal-{self.member}-{self._count:06}.jsonl"
            with _uploading(file):
                file.write_bytes(b"".join([self.first_line(), *self._lines]))
            self._count += 1
        self._lines, self._flushed = [], time.monotonic()


@dataclass(frozen=True)
class _BucketWriter:
    folder: AnyPath
    layout: ArrayLayout
    compression: Compression

    def write_chunk(self, index: Index, chunk: Array) -> None:
        """As :class:`~dsv4_convert.store.destination.ChunkWriter` has it; copies the chunk."""
        file = self.folder / chunk_file(index)
        data = encoded_chunk(self.layout, self.compression, index, chunk)
        with _uploading(file):
            file.write_bytes(data)


class Bucket:
    """A :class:`~dsv4_convert.store.destination.Destination` in a bucket."""

    def __init__(self, target: AnyPath) -> None:
        self._target = target
        self._work = target.with_name(target.name + SUFFIX)

    @property
    def target(self) -> AnyPath:
        return self._target

    def check(self, *, overwrite: bool) -> None:
        if not self._target.exists():
            return
        if (self._target / MANIFEST_FILE).exists():
            more = " --overwrite is for folders: in a bucket nothing can be replaced at once." if overwrite else ""
            raise UsageError(f"{self._target}: exists already.{more} Choose another destination, or remove it first.")
        if not self._work.exists():
            raise UsageError(f"{self._target}: exists, and is neither a checkpoint nor an interrupted run of dsv4.")

    @contextmanager
    def held(self) -> Iterator[None]:
        lock = self._work / "lock"
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = f"pid {os.getpid()} on {socket.gethostname()}, since {since},"
        with _uploading(lock):
            taken = BucketFolder(str(self._work)).create("lock", holder.encode())
        if not taken:
            raise ResourceError(
                f"{self._target}: {lock.read_text()} is writing it. Wait for it; if it was killed, delete {lock} and "
                "run the same command again."
            )
        try:
            yield
        finally:
            with suppress(Exception):  # the work folder is gone when all is done
                lock.unlink(missing_ok=True)

    def clear(self) -> None:
        for file in self._work.glob("journal*.jsonl"):
            file.unlink()
        if self._target.exists():
            self._target.rmtree()  # type: ignore[attr-defined]  # epath's own

    def prepare(self, layouts: Mapping[str, ArrayLayout], *, plan: Mapping[str, Any], compression: Compression) -> None:
        journal = _BucketJournal.open(self._work, plan=plan)
        chunks: dict[str, dict[Index, str]] = {}
        for path, layout in layouts.items():
            folder = self._target / path
            digests = journal.chunks.get(path, {})
            there = {file.name for file in folder.iterdir()} if digests else set()
            if kept := {index: digest for index, digest in digests.items() if chunk_file(index) in there}:
                chunks[path] = kept
            if ARRAY_METADATA_FILE not in there:
                with _uploading(folder):
                    (folder / ARRAY_METADATA_FILE).write_bytes(array_metadata(layout, compression))
        journal.chunks = chunks
        journal.rewrite()

    def journal(self, plan: Mapping[str, Any], member: int) -> Journal:
        return _BucketJournal.open(self._work, plan=plan, member=member)

    def writer(self, path: str, layout: ArrayLayout, compression: Compression) -> ChunkWriter:
        return _BucketWriter(self._target / path, layout, compression)

    @contextmanager
    def committing(self, paths: Iterable[str]) -> Iterator[Path]:
        """The files beside the arrays are made in a local folder, and go to the bucket when all are there."""
        scratch = Path(tempfile.mkdtemp(prefix="dsv4-commit-"))
        try:
            for name, data in orbax_files(paths).items():
                write_file(scratch / name, data)
            yield scratch
            names = sorted(file.name for file in scratch.iterdir())
            for name in [*(name for name in names if name not in _LAST), *_LAST]:
                with _uploading(self._target / name):
                    (self._target / name).write_bytes((scratch / name).read_bytes())
        finally:
            shutil.rmtree(scratch)
        self._work.rmtree()  # type: ignore[attr-defined]  # epath's own

    def free(self) -> int | None:
        return None

    def device(self) -> int | None:
        return None

    def probe(self, chunk: Array, count: int, compression: Compression) -> tuple[float, int]:
        scratch = self._target.with_name(self._target.name + ".dsv4-probe")
        layout = ArrayLayout(shape=(count, *chunk.shape), dtype=chunk.dtype, chunk_shape=(1, *chunk.shape))
        try:
            seconds = timed_writes(_BucketWriter(scratch, layout, compression), layout.chunk_indices(), chunk)
            return seconds, sum(file.stat().length for file in scratch.iterdir())  # type: ignore[attr-defined]
        finally:
            if scratch.exists():
                scratch.rmtree()  # type: ignore[attr-defined]
