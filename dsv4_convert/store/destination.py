"""The destination of a checkpoint: the interface of a folder (:mod:`.folder`) and of a bucket (:mod:`.bucket`)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from dsv4_convert.store.arrays import Array, Compression
from dsv4_convert.store.journal import Journal
from dsv4_convert.store.layout import ArrayLayout, Index

#: A local path, or the path in a bucket that etils.epath makes of a URL, which has the methods used here.
AnyPath: TypeAlias = Path


class ChunkWriter(Protocol):
    """Writes the chunks of one array; threads and processes may write at once."""

    def write_chunk(self, index: Index, chunk: Array) -> None:
        """Write a chunk durably; it is C-contiguous, of the layout's dtype and the clipped shape."""


class Destination(Protocol):
    """The place that a checkpoint is written to, and the work that is done beside it."""

    @property
    def target(self) -> AnyPath:
        """Where the checkpoint will be."""

    def check(self, *, overwrite: bool) -> None:
        """Refuse a destination that must not be replaced (:class:`UsageError`) or cannot be made
        (:class:`ResourceError`)."""

    def held(self) -> AbstractContextManager[object]:
        """Keep others from writing the same destination. Raises :class:`ResourceError` if one does."""

    def clear(self) -> None:
        """Discard what an interrupted run left."""

    def prepare(self, layouts: Mapping[str, ArrayLayout], *, plan: Mapping[str, Any], compression: Compression) -> None:
        """Make an array for every leaf, and journal and arrays agree, whatever an interrupted run left."""

    def journal(self, plan: Mapping[str, Any], member: int) -> Journal:
        """Read the record of all processes so far; process ``member`` goes on with it."""

    def writer(self, path: str, layout: ArrayLayout, compression: Compression) -> ChunkWriter:
        """Give the writer of a leaf's chunks."""

    def committing(self, paths: Iterable[str]) -> AbstractContextManager[Path]:
        """Make an Orbax checkpoint of these leaves; its local folder can be added to before all of it appears."""

    def free(self) -> int | None:
        """Bytes that are free, those written by an interrupted run included; None where there is no end."""

    def device(self) -> int | None:
        """Give the number of the disk; None for a bucket."""

    def probe(self, chunk: Array, count: int, compression: Compression) -> tuple[float, int]:
        """Write a chunk ``count`` times and remove it again: seconds, and bytes that were stored."""


def timed_writes(writer: ChunkWriter, indices: Iterable[Index], chunk: Array) -> float:
    """Seconds to write the same chunk as each of a stack."""
    start = time.perf_counter()
    for index in indices:
        writer.write_chunk(index, chunk[None])
    return max(time.perf_counter() - start, 1e-6)
