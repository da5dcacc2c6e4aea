"""Write a model tree as an Orbax checkpoint: in bounded memory, resumable, complete or absent."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np

from dsv4_convert.errors import listed
from dsv4_convert.files.writing import sync
from dsv4_convert.store.arrays import Array, Compression, write_file
from dsv4_convert.store.digests import digest_of
from dsv4_convert.store.journal import Journal
from dsv4_convert.store.layout import MANIFEST_FILE, ArrayLayout, Index, chunk_digest, is_file_name, path_problems
from dsv4_convert.store.locate import open_destination
from dsv4_convert.store.manifest import LeafRecord, Manifest
from dsv4_convert.store.processes import ALONE, Processes

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class LeafSpec:
    """One leaf to write.

    Attributes:
        path: dotted path in the tree, such as ``layers.12.attn.wq_a``.
        shape: shape of the whole leaf.
        dtype: one of :data:`~dsv4_convert.store.layout.DTYPES`.
        chunk_shape: shape of a chunk, of the same rank; see :func:`~dsv4_convert.store.layout.row_chunks`.
        sources: names of its source tensors, for the manifest.
        rule: name of the rule that makes it, for the manifest.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    rule: str = ""

    @cached_property
    def layout(self) -> ArrayLayout:
        """Shape, dtype and chunk grid; raises ``ValueError`` where they do not fit together."""
        return ArrayLayout(shape=self.shape, dtype=self.dtype, chunk_shape=self.chunk_shape)


@dataclass(frozen=True)
class Chunk:
    """A chunk to write: its leaf, and its index in the leaf's grid."""

    leaf: LeafSpec
    index: Index

    @property
    def shape(self) -> tuple[int, ...]:
        """Without padding."""
        return self.leaf.layout.clipped_shape(self.index)

    @property
    def nbytes(self) -> int:
        """Canonical bytes."""
        return math.prod(self.shape) * self.leaf.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class WriteSummary:
    """What was written.

    Attributes:
        records: the manifest's record of every leaf, in the order of the paths.
        side_records: what :meth:`CheckpointWriter.add_side_record` kept, by name.
        total_bytes: canonical bytes of all leaves.
        kept_bytes: those of them that an earlier, interrupted run had written.
    """

    records: Mapping[str, LeafRecord]
    side_records: Mapping[str, Any]
    total_bytes: int
    kept_bytes: int

    @property
    def written_bytes(self) -> int:
        """Canonical bytes that this run wrote."""
        return self.total_bytes - self.kept_bytes


class CheckpointWriter:
    """Writes an Orbax checkpoint::

        with CheckpointWriter(destination, leaves, fingerprint=settings) as writer:
            for chunk in writer.pending():
                writer.write(chunk, make(chunk))
            summary = writer.commit()

    Chunks grow in ``destination + ".dsv4-partial"``; the destination appears by one rename when all is on the disk.
    After an interruption of any kind, the same program goes on with the chunks that are missing. The writer holds no
    chunk in memory; see :class:`~dsv4_convert.store.arrays.ArrayWriter` for the cases in which one is copied.

    Several processes write one checkpoint together when each uses a writer with the same arguments, writes some of the
    pending chunks, and commits. They see the same file system. A failure of one process is a failure of all.
    """

    def __init__(
        self,
        destination: str | os.PathLike[str],
        leaves: Sequence[LeafSpec],
        *,
        fingerprint: Mapping[str, Any],
        compression: Compression = "none",
        processes: Processes = ALONE,
        restart: bool = False,
        overwrite: bool = False,
    ) -> None:
        """
        Args:
            destination: a local path, or a URL such as ``gs://bucket/model`` (see :mod:`.bucket`).
            leaves: the tree to write.
            fingerprint: JSON that identifies the content besides paths, shapes, dtypes, sources and rules, such as the
                source's revision and the options; only a run with the same fingerprint is continued.
            compression: ``"zstd"`` writes less and is several times slower.
            processes: the processes that share the work.
            restart: discard what an interrupted run left.
            overwrite: replace an existing checkpoint of dsv4 at ``destination`` when the new one is complete.

        Raises:
            ValueError: the leaves do not form a tree, or a layout is impossible.
            UsageError: the destination exists, or is a URL that dsv4 cannot write to.
        """
        self._destination = open_destination(destination)
        if problems := path_problems([leaf.path for leaf in leaves]):
            raise ValueError(f"the leaves do not form a tree:\n{listed(problems)}")
        if not leaves:
            raise ValueError("a checkpoint needs at least one leaf")
        self._leaves = tuple(leaves)
        self._layouts = {leaf.path: leaf.layout for leaf in leaves}
        self._plan = _plan(leaves, fingerprint, compression)
        self._compression = compression
        self.processes = processes
        self._restart = restart
        self._overwrite = overwrite
        self._destination.check(overwrite=overwrite)
        self._lock = threading.Lock()
        self._summary: WriteSummary | None = None

    def __enter__(self) -> Self:
        """Take the lock and find out what an interrupted run has left.

        Raises:
            UsageError: the destination appeared meanwhile, or an interrupted run had other settings.
            ResourceError: the disk is full or failing, or another process writes the same destination.
            BadInput: the journal of an interrupted run is damaged.
        """
        with ExitStack() as held:
            held.enter_context(self.processes.together())
            with self.processes.step("prepare"):
                if self.processes.first:
                    held.enter_context(self._destination.held())
                    # Again, as another writer may have published meanwhile.
                    self._destination.check(overwrite=self._overwrite)
                    if self._restart:
                        self._destination.clear()
                    self._destination.prepare(self._layouts, plan=self._plan, compression=self._compression)
            with self.processes.step("look"):
                self._journal = self._read_journal()
            self._writers = {
                path: self._destination.writer(path, layout, self._compression)
                for path, layout in self._layouts.items()
            }
            self.total_bytes = sum(layout.nbytes for layout in self._layouts.values())
            self.kept_bytes = self.total_bytes - sum(chunk.nbytes for chunk in self.pending())
            self._appending = held.enter_context(ExitStack())
            self._appending.enter_context(self._journal.appending())
            self._held = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.__exit__(kind, error, trace)

    def pending(self) -> list[Chunk]:
        """The chunks that neither this writer nor an interrupted run has written, leaf by leaf."""
        return [
            Chunk(leaf, index)
            for leaf in self._leaves
            for index in leaf.layout.chunk_indices()
            if index not in self._journal.chunks.get(leaf.path, ())
        ]

    @property
    def side_records(self) -> Mapping[str, Any]:
        """The side records of this run and of an interrupted one, by name."""
        return self._journal.side_records

    def write(self, chunk: Chunk, array: Array) -> None:
        """Hash a chunk and write it durably. Threads may write at once.

        Args:
            chunk: one of :meth:`pending`.
            array: C-contiguous, of the chunk's shape and the leaf's dtype; may be overwritten afterwards.

        Raises:
            ValueError: an array of another shape, dtype or order.
            ResourceError: the disk is full or failing.
        """
        leaf, index = chunk.leaf, chunk.index
        if array.shape != chunk.shape or array.dtype != leaf.dtype or not array.flags.c_contiguous:
            raise ValueError(
                f"{leaf.path}, chunk {index}: got {array.dtype} {array.shape}"
                f"{'' if array.flags.c_contiguous else ', not C-contiguous'}; expected {leaf.dtype} {chunk.shape}"
            )
        digest = chunk_digest(array)
        self._writers[leaf.path].write_chunk(index, array)
        with self._lock:
            self._journal.add_chunk(leaf.path, index, digest)

    def add_side_record(self, name: str, value: Any) -> None:
        """Keep JSON found during the run, so that a resumed run need not find it again."""
        with self._lock:
            self._journal.add_side_record(name, value)

    def finish(self) -> WriteSummary:
        """Wait until all processes have written what they had to write.

        Returns:
            The summary, the same in every process but for the bytes kept.

        Raises:
            ValueError: a chunk is missing.
            Dsv4Error: another process failed.
        """
        if self._summary is None:
            with self.processes.step("write"):
                self._appending.close()
            self._journal = self._read_journal()
            if missing := self.pending():
                raise ValueError(
                    f"{len(missing)} chunks were not written, such as {missing[0].index} of {missing[0].leaf.path}"
                )
            self._summary = WriteSummary(
                records={leaf.path: self._record(leaf) for leaf in sorted(self._leaves, key=lambda leaf: leaf.path)},
                side_records=dict(self.side_records),
                total_bytes=self.total_bytes,
                kept_bytes=self.kept_bytes,
            )
        return self._summary

    def commit(self, metadata: Mapping[str, Any] = _NOTHING, files: Mapping[str, bytes] = _NOTHING) -> WriteSummary:
        """:meth:`finish`, and let the checkpoint appear at its destination. The first process does so.

        Args:
            metadata: JSON for the manifest.
            files: contents of further files of the checkpoint's folder by name.

        Raises:
            ValueError: a chunk is missing, or the name of a file is impossible.
            ResourceError: the disk is full or failing.
            Dsv4Error: another process failed.
        """
        summary = self.finish()
        with self.processes.step("commit"):
            if self.processes.first:
                with self._destination.committing(self._layouts) as folder:
                    _complete(folder, summary, metadata, files)
        return summary

    def _read_journal(self) -> Journal:
        return self._destination.journal(self._plan, self.processes.index)

    def _record(self, leaf: LeafSpec) -> LeafRecord:
        digests = self._journal.chunks.get(leaf.path, {})
        return LeafRecord(
            layout=leaf.layout,
            chunk_digests=tuple(digests[index] for index in leaf.layout.chunk_indices()),
            sources=leaf.sources,
            rule=leaf.rule,
        )


def _plan(leaves: Sequence[LeafSpec], fingerprint: Mapping[str, Any], compression: Compression) -> dict[str, Any]:
    """The journal's first line: the caller's fingerprint, and a digest of all leaf specs."""
    outlines = [
        [leaf.path, leaf.shape, leaf.dtype.name, leaf.layout.chunk_shape, leaf.sources, leaf.rule]
        for leaf in sorted(leaves, key=lambda leaf: leaf.path)
    ]
    plan = {
        "journal_version": 3,
        "compression": compression,
        "leaves": hashlib.sha256(json.dumps(outlines).encode()).hexdigest(),
        **{f"fingerprint.{key}": value for key, value in fingerprint.items()},
    }
    return dict(json.loads(json.dumps(plan)))  # tuples become lists, as they will when the journal is read


def _complete(folder: Path, summary: WriteSummary, metadata: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Add the further files, and the manifest as the last one."""
    for name, content in files.items():
        if not is_file_name(name) or name == MANIFEST_FILE or (folder / name).exists():
            raise ValueError(f"extra file {name!r}: not a plain name, or the name of a file or leaf of the checkpoint")
        write_file(folder / name, content)
    digests = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_file():
            digests[entry.name] = digest_of(entry.read_bytes())
    manifest = Manifest(leaves=summary.records, files=digests, metadata=metadata)
    write_file(folder / MANIFEST_FILE, manifest.to_bytes())
    sync(folder)
