"""Write a model tree as an Orbax checkpoint: in bounded memory, resumable, complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_convert.errors import BadInput, UsageError, listed
from dsv4_convert.store.arrays import Array, ArrayWriter, Compression, StoredArray, sync, write_file, writing
from dsv4_convert.store.layout import (
    MANIFEST_FILE,
    ArrayLayout,
    Index,
    chunk_digest,
    is_file_name,
    path_problems,
)
from dsv4_convert.store.manifest import LeafRecord, Manifest
from dsv4_convert.store.staging import Journal, Staging, staging_area
from dsv4_convert.store.threads import work_through

#: Called after every chunk with (bytes done, bytes in total, path of the leaf), one call at a time, from any thread.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class LeafSpec:
    """One leaf to write.

    Attributes:
        path: dotted path in the tree, such as ``layers.12.attn.wq_a``.
        shape: shape of the whole leaf.
        dtype: one of :data:`~dsv4_convert.store.layout.DTYPES`.
        chunk_shape: shape of a chunk, of the same rank; see :func:`~dsv4_convert.store.layout.row_chunks`.
        chunks: gives chunk ``index`` of the grid as a C-contiguous array of ``dtype``, clipped to ``shape``. Called
            from several threads at once; the array may be a buffer that the same thread's next call overwrites.
        sources: names of the tensors that it is made of, for the manifest.
        rule: name of how it is made, for the manifest.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_shape: tuple[int, ...]
    chunks: Callable[[Index], Array]
    sources: tuple[str, ...] = ()
    rule: str = ""

    @cached_property
    def layout(self) -> ArrayLayout:
        """Shape, dtype and chunk grid; raises ``ValueError`` where they do not fit together."""
        return ArrayLayout(shape=self.shape, dtype=self.dtype, chunk_shape=self.chunk_shape)


@dataclass(frozen=True, kw_only=True)
class WriteSummary:
    """What was written.

    Attributes:
        records: the manifest's record of every leaf, in the order of the paths.
        total_bytes: canonical bytes of all leaves.
        written_bytes: those of them that this run wrote.
        resumed_leaves: number of leaves that an earlier run had finished.
    """

    records: Mapping[str, LeafRecord]
    total_bytes: int
    written_bytes: int
    resumed_leaves: int


def write_checkpoint(
    destination: str | os.PathLike[str],
    leaves: Sequence[LeafSpec],
    *,
    fingerprint: Mapping[str, Any],
    metadata: Callable[[WriteSummary], Mapping[str, Any]] = lambda _: {},
    extra_files: Callable[[WriteSummary], Mapping[str, bytes]] = lambda _: {},
    compression: Compression = "none",
    workers: int = 2,
    progress: Progress | None = None,
    restart: bool = False,
    overwrite: bool = False,
) -> WriteSummary:
    """Write ``leaves`` as an Orbax checkpoint at ``destination``, a folder that must not exist.

    Leaves are written in the given order, chunk by chunk, into ``destination + ".dsv4-partial"``; the destination
    appears by one rename when all is on the disk. After an interruption of any kind the same call goes on after the
    last finished leaf. Peak memory is what ``leaves[i].chunks`` uses in ``workers`` threads; see
    :class:`~dsv4_convert.store.arrays.ArrayWriter` for the cases in which a chunk is copied.

    Args:
        destination: local path of the checkpoint.
        leaves: what to write.
        fingerprint: JSON that identifies the content besides paths, shapes, dtypes, sources and rules, such as the
            source's revision and the options; an interrupted run is only continued when it is the same.
        metadata: JSON for the manifest, asked for when all leaves are written.
        extra_files: contents of further files of the checkpoint's folder by name, asked for at the same time.
        compression: ``"zstd"`` writes less and is several times slower.
        workers: threads that make, hash and write chunks.
        progress: see :data:`Progress`; also called once at the start if earlier leaves are kept.
        restart: discard what an interrupted run left.
        overwrite: replace an existing checkpoint of dsv4 at ``destination``, when the new one is complete.

    Raises:
        ValueError: leaves do not form a tree, a layout or an extra file's name is impossible, or ``chunks`` gave an
            array of another shape or dtype.
        UsageError: the destination exists, is not local, or an interrupted run had other settings.
        ResourceError: the disk is full or failing, or another process writes the same destination.
        BadInput: the journal of an interrupted run is damaged.
    """
    target = _local_path(destination)
    if problems := path_problems([leaf.path for leaf in leaves]):
        raise ValueError(f"the leaves do not form a tree:\n{listed(problems)}")
    if not leaves:
        raise ValueError("a checkpoint needs at least one leaf")
    plan = _plan(leaves, fingerprint, compression)
    _check_destination(target, overwrite=overwrite)
    with staging_area(target) as staging:
        _check_destination(target, overwrite=overwrite)  # again: another writer may have published meanwhile
        if restart:
            staging.clear()
        journal = Journal(staging.journal_file, plan=plan)
        staging.take_back_leaves()
        finished = _intact_leaves(leaves, staging, journal)
        todo = [leaf for leaf in leaves if leaf.path not in finished]
        total = sum(leaf.layout.nbytes for leaf in leaves)
        remaining = sum(leaf.layout.nbytes for leaf in todo)
        done = total - remaining

        def report(nbytes: int, path: str) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, total, path)

        if finished:
            report(0, next(iter(finished)))
        written = _write_leaves(todo, staging, journal, compression, workers=workers, report=report)
        digests = {**finished, **written}
        summary = WriteSummary(
            records={
                leaf.path: LeafRecord(
                    layout=leaf.layout, chunk_digests=digests[leaf.path], sources=leaf.sources, rule=leaf.rule
                )
                for leaf in sorted(leaves, key=lambda leaf: leaf.path)
            },
            total_bytes=total,
            written_bytes=remaining,
            resumed_leaves=len(finished),
        )
        _commit(staging, summary, metadata(summary), extra_files(summary))
        staging.publish(target)
    return summary


def _local_path(destination: str | os.PathLike[str]) -> Path:
    text = os.fspath(destination)
    if "://" in text:
        raise UsageError(f"{text}: only local folders can be written. Write to a local folder, then copy it there.")
    return Path(os.path.abspath(text))


def _check_destination(target: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise UsageError(f"{target}: exists already. Choose another destination, remove it, or allow overwriting.")
    if not (target / MANIFEST_FILE).is_file():
        raise UsageError(f"{target}: not overwritten, because it is not a checkpoint of dsv4 (no {MANIFEST_FILE}).")


def _plan(leaves: Sequence[LeafSpec], fingerprint: Mapping[str, Any], compression: Compression) -> dict[str, Any]:
    """The journal's first line: the caller's fingerprint as it is, and a digest of what every leaf will be."""
    outlines = [
        [leaf.path, leaf.shape, leaf.dtype.name, leaf.layout.chunk_shape, leaf.sources, leaf.rule]
        for leaf in sorted(leaves, key=lambda leaf: leaf.path)
    ]
    plan = {
        "journal_version": 1,
        "compression": compression,
        "leaves": hashlib.sha256(json.dumps(outlines).encode()).hexdigest(),
        **{f"fingerprint.{key}": value for key, value in fingerprint.items()},
    }
    return dict(json.loads(json.dumps(plan)))  # tuples become lists, as they will when the journal is read


def _intact_leaves(leaves: Sequence[LeafSpec], staging: Staging, journal: Journal) -> dict[str, tuple[str, ...]]:
    """Chunk digests of the leaves that the journal calls finished and whose files are all there."""
    intact = {}
    for leaf in leaves:
        digests = journal.finished.get(leaf.path)
        if digests is None:
            continue
        try:
            stored = StoredArray.open(staging.leaf(leaf.path))
        except BadInput:
            continue
        if stored.layout == leaf.layout and not stored.missing_chunks():
            intact[leaf.path] = digests
    return intact


class _Leaf:
    """A leaf while it is written: its array, and the digests of the chunks so far."""

    def __init__(self, spec: LeafSpec, staging: Staging, compression: Compression) -> None:
        folder = staging.leaf(spec.path)
        with writing(folder):
            if folder.exists():  # unfinished, or damaged since
                shutil.rmtree(folder)
            folder.mkdir()
        self.spec = spec
        self.writer = ArrayWriter(folder, spec.layout, compression)
        self.digests: dict[Index, str] = {}

    def write(self, index: Index) -> tuple[str, int]:
        """Make, hash and write one chunk; returns its digest and its canonical bytes."""
        chunk = self.spec.chunks(index)
        expected = self.spec.layout.clipped_shape(index)
        if chunk.shape != expected or chunk.dtype != self.spec.dtype or not chunk.flags.c_contiguous:
            raise ValueError(
                f"{self.spec.path}, chunk {index}: got {chunk.dtype} {chunk.shape}"
                f"{'' if chunk.flags.c_contiguous else ', not C-contiguous'}; expected {self.spec.dtype} {expected}"
            )
        digest = chunk_digest(chunk)
        self.writer.write_chunk(index, chunk)
        return digest, chunk.nbytes

    @property
    def complete(self) -> bool:
        return len(self.digests) == self.spec.layout.chunk_count

    def finish(self, journal: Journal) -> tuple[str, ...]:
        """Make the leaf durable, then record it."""
        self.writer.finish()
        digests = tuple(self.digests[index] for index in self.spec.layout.chunk_indices())
        journal.append(self.spec.path, digests)
        return digests


def _write_leaves(
    todo: Sequence[LeafSpec],
    staging: Staging,
    journal: Journal,
    compression: Compression,
    *,
    workers: int,
    report: Callable[[int, str], None],
) -> dict[str, tuple[str, ...]]:
    """Write leaves in order; chunk digests of each by its path. ``report`` gets the bytes of every chunk written."""
    written: dict[str, tuple[str, ...]] = {}

    def chunks() -> Iterator[tuple[_Leaf, Index]]:
        for spec in todo:
            leaf = _Leaf(spec, staging, compression)
            if leaf.complete:  # an array without elements has no chunks
                written[spec.path] = leaf.finish(journal)
            for index in spec.layout.chunk_indices():
                yield leaf, index

    def note(task: tuple[_Leaf, Index], result: tuple[str, int]) -> None:
        leaf, index = task
        leaf.digests[index], nbytes = result
        if leaf.complete:
            written[leaf.spec.path] = leaf.finish(journal)
        report(nbytes, leaf.spec.path)

    work_through(chunks(), lambda task: task[0].write(task[1]), note, workers=workers)
    return written


def _commit(
    staging: Staging, summary: WriteSummary, metadata: Mapping[str, Any], extra_files: Mapping[str, bytes]
) -> None:
    """Build the checkpoint in ``staging.commit``, with the manifest as the last file."""
    from dsv4_convert.store.orbax_commit import commit_arrays

    commit_arrays({path: staging.leaf(path) for path in summary.records}, staging.commit)
    for name, content in extra_files.items():
        if not is_file_name(name) or name == MANIFEST_FILE or (staging.commit / name).exists():
            raise ValueError(f"extra file {name!r}: not a plain name, or the name of a file or leaf of the checkpoint")
        write_file(staging.commit / name, content)
    files = {}
    for entry in sorted(staging.commit.iterdir()):
        if entry.is_file():
            sync(entry)  # Orbax does not wait for the disk
            files[entry.name] = hashlib.sha256(entry.read_bytes()).hexdigest()
    manifest = Manifest(leaves=summary.records, files=files, metadata=metadata)
    write_file(staging.commit / MANIFEST_FILE, manifest.to_bytes())
    sync(staging.commit)
