"""Write a model tree as an Orbax checkpoint: in bounded memory, resumable, complete or absent."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from dsv4_convert.errors import listed
from dsv4_convert.store.arrays import Array, Compression, sync, write_file
from dsv4_convert.store.layout import MANIFEST_FILE, ArrayLayout, Index, chunk_digest, is_file_name, path_problems
from dsv4_convert.store.manifest import LeafRecord, Manifest
from dsv4_convert.store.places import ChunkWriter, Place, place_of
from dsv4_convert.store.processes import ALONE, Processes
from dsv4_convert.store.staging import Journal
from dsv4_convert.store.threads import work_through

#: Where a task stands in the order of the work: smaller ones first, equal ones in the order of the leaves.
Rank: TypeAlias = tuple[int, ...]

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
        rank: when a chunk is written.
        sources: names of the tensors that it is made of, for the manifest.
        rule: name of how it is made, for the manifest.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_shape: tuple[int, ...]
    chunks: Callable[[Index], Array]
    rank: Callable[[Index], Rank] = lambda _: ()
    sources: tuple[str, ...] = ()
    rule: str = ""

    @cached_property
    def layout(self) -> ArrayLayout:
        """Shape, dtype and chunk grid; raises ``ValueError`` where they do not fit together."""
        return ArrayLayout(shape=self.shape, dtype=self.dtype, chunk_shape=self.chunk_shape)


@dataclass(frozen=True, kw_only=True)
class Note:
    """Something to find out while the leaves are written, and kept over interruptions as they are.

    Attributes:
        name: unique among the notes.
        value: finds it out: JSON. Called from any thread.
        rank: when.
    """

    name: str
    value: Callable[[], Any]
    rank: Rank = ()


@dataclass(frozen=True, kw_only=True)
class WriteSummary:
    """What was written.

    Attributes:
        records: the manifest's record of every leaf, in the order of the paths.
        notes: the value of every note by its name.
        total_bytes: canonical bytes of all leaves.
        kept_bytes: those of them that an earlier, interrupted run had written.
    """

    records: Mapping[str, LeafRecord]
    notes: Mapping[str, Any]
    total_bytes: int
    kept_bytes: int

    @property
    def written_bytes(self) -> int:
        """Canonical bytes that this run wrote."""
        return self.total_bytes - self.kept_bytes


def write_checkpoint(
    destination: str | os.PathLike[str],
    leaves: Sequence[LeafSpec],
    *,
    fingerprint: Mapping[str, Any],
    notes: Sequence[Note] = (),
    metadata: Callable[[WriteSummary], Mapping[str, Any]] = lambda _: {},
    extra_files: Callable[[WriteSummary], Mapping[str, bytes]] = lambda _: {},
    compression: Compression = "none",
    workers: int = 4,
    processes: Processes = ALONE,
    progress: Progress | None = None,
    committed: Callable[[str, Index | None], None] = lambda name, index: None,
    stopping: Callable[[], None] = lambda: None,
    restart: bool = False,
    overwrite: bool = False,
) -> WriteSummary:
    """Write ``leaves`` as an Orbax checkpoint at ``destination``, a folder that must not exist.

    Chunks are written in the order of their ranks into ``destination + ".dsv4-partial"``; the destination appears by
    one rename when all is on the disk. After an interruption of any kind the same call goes on with the chunks that
    are missing. Peak memory is what ``leaves[i].chunks`` uses in ``workers`` threads; see
    :class:`~dsv4_convert.store.arrays.ArrayWriter` for the cases in which a chunk is copied.

    Args:
        destination: of the checkpoint: a local path, or a URL such as ``gs://bucket/model`` (see :mod:`.bucket`).
        leaves: what to write.
        fingerprint: JSON that identifies the content besides paths, shapes, dtypes, sources and rules, such as the
            source's revision and the options; an interrupted run is only continued when it is the same.
        notes: what to find out on the way.
        metadata: JSON for the manifest, asked for when all leaves are written.
        extra_files: contents of further files of the checkpoint's folder by name, asked for at the same time.
        compression: ``"zstd"`` writes less and is several times slower.
        workers: threads that make, hash and write chunks. More than there are cores, so that these have work while
            some threads wait for the disk.
        processes: those that share the work, each calling this with the same arguments. Every one writes its share of
            the bytes, and the first one commits. They see the same file system.
        progress: see :data:`Progress`; of the share of this process. Called with no path at the start, when the bytes
            that are kept are known.
        committed: called with (path of the leaf, index) of every chunk, and (name, None) of every note, that is safe
            on the disk, those of an earlier run included; one call at a time, from any thread.
        stopping: called after a failure or an interrupt, to end what ``leaves[i].chunks`` may be waiting for.
        restart: discard what an interrupted run left.
        overwrite: replace an existing checkpoint of dsv4 at ``destination``, when the new one is complete.

    Returns:
        The same in every process, but for the bytes kept.

    Raises:
        ValueError: leaves do not form a tree, a layout or an extra file's name is impossible, or ``chunks`` gave an
            array of another shape or dtype.
        UsageError: the destination exists, is a URL of nothing known, or an interrupted run had other settings.
        ResourceError: the disk is full or failing, another process writes the same destination, or one of the
            ``processes`` failed.
        BadInput: the journal of an interrupted run is damaged.
    """
    place = place_of(destination)
    if problems := path_problems([leaf.path for leaf in leaves]):
        raise ValueError(f"the leaves do not form a tree:\n{listed(problems)}")
    if not leaves:
        raise ValueError("a checkpoint needs at least one leaf")
    plan = _plan(leaves, fingerprint, compression)
    layouts = {leaf.path: leaf.layout for leaf in leaves}
    place.check(overwrite=overwrite)
    with ExitStack() as held:
        with processes.step("prepare"):
            if processes.first:
                held.enter_context(place.held())
                place.check(overwrite=overwrite)  # again: another writer may have published meanwhile
                if restart:
                    place.clear()
                place.prepare(layouts, plan=plan, compression=compression)
        with processes.step("look"):
            journal = place.journal(plan, processes.index)
        with processes.step("write"):
            for path, digests in journal.chunks.items():
                for index in digests:
                    committed(path, index)
            for name in journal.notes:
                committed(name, None)
            tasks = _in_order(leaves, notes, place, journal, compression)
            total = sum(layout.nbytes for layout in layouts.values())
            kept = total - sum(task.nbytes for task in tasks)
            mine = _share(tasks, processes)
            _work(mine, journal, workers=workers, kept=kept, progress=progress, committed=committed, stopping=stopping)
        with processes.step("commit"):
            journal = place.journal(plan, processes.index)
            summary = WriteSummary(
                records={leaf.path: _record(leaf, journal) for leaf in sorted(leaves, key=lambda leaf: leaf.path)},
                notes={note.name: journal.notes[note.name] for note in notes},
                total_bytes=total,
                kept_bytes=kept,
            )
            if processes.first:
                with place.committing(layouts, compression) as folder:
                    _complete(folder, summary, metadata(summary), extra_files(summary))
    return summary


def _plan(leaves: Sequence[LeafSpec], fingerprint: Mapping[str, Any], compression: Compression) -> dict[str, Any]:
    """The journal's first line: the caller's fingerprint as it is, and a digest of what every leaf will be."""
    outlines = [
        [leaf.path, leaf.shape, leaf.dtype.name, leaf.layout.chunk_shape, leaf.sources, leaf.rule]
        for leaf in sorted(leaves, key=lambda leaf: leaf.path)
    ]
    plan = {
        "journal_version": 2,
        "compression": compression,
        "leaves": hashlib.sha256(json.dumps(outlines).encode()).hexdigest(),
        **{f"fingerprint.{key}": value for key, value in fingerprint.items()},
    }
    return dict(json.loads(json.dumps(plan)))  # tuples become lists, as they will when the journal is read


@dataclass(frozen=True)
class _ChunkTask:
    """A chunk to write."""

    spec: LeafSpec
    index: Index
    writer: ChunkWriter

    @property
    def nbytes(self) -> int:
        spec = self.spec
        return math.prod(spec.layout.clipped_shape(self.index)) * spec.dtype.itemsize

    def run(self) -> str:
        """Make, hash and write the chunk; its digest."""
        spec, index = self.spec, self.index
        chunk = spec.chunks(index)
        expected = spec.layout.clipped_shape(index)
        if chunk.shape != expected or chunk.dtype != spec.dtype or not chunk.flags.c_contiguous:
            raise ValueError(
                f"{spec.path}, chunk {index}: got {chunk.dtype} {chunk.shape}"
                f"{'' if chunk.flags.c_contiguous else ', not C-contiguous'}; expected {spec.dtype} {expected}"
            )
        digest = chunk_digest(chunk)
        self.writer.write_chunk(index, chunk)
        return digest

    def enter(self, journal: Journal, result: str) -> tuple[str, Index | None]:
        journal.add_chunk(self.spec.path, self.index, result)
        return self.spec.path, self.index


@dataclass(frozen=True)
class _NoteTask:
    """A note to find out."""

    note: Note
    #: Nothing is written for it.
    nbytes: int = 0

    def run(self) -> Any:
        return self.note.value()

    def enter(self, journal: Journal, result: Any) -> tuple[str, Index | None]:
        journal.add_note(self.note.name, result)
        return self.note.name, None


_Task: TypeAlias = _ChunkTask | _NoteTask


def _in_order(
    leaves: Sequence[LeafSpec], notes: Sequence[Note], place: Place, journal: Journal, compression: Compression
) -> list[_Task]:
    """Everything that is not in the journal yet, by rank."""
    ranked: list[tuple[Rank, _Task]] = [
        (note.rank, _NoteTask(note)) for note in notes if note.name not in journal.notes
    ]
    for spec in leaves:
        writer = place.writer(spec.path, spec.layout, compression)
        done = journal.chunks.get(spec.path, {})
        ranked += [
            (spec.rank(index), _ChunkTask(spec, index, writer))
            for index in spec.layout.chunk_indices()
            if index not in done
        ]
    return [task for _, task in sorted(ranked, key=lambda entry: entry[0])]


def _share(tasks: Sequence[_Task], processes: Processes) -> list[_Task]:
    """The tasks of this process: a run of neighbours with its part of the bytes, which reads a part of the source."""
    if processes.count == 1:
        return list(tasks)
    total = sum(task.nbytes for task in tasks) or 1
    mine, before = [], 0
    for task in tasks:
        if min(before * processes.count // total, processes.count - 1) == processes.index:
            mine.append(task)
        before += task.nbytes
    return mine


def _work(
    tasks: Sequence[_Task],
    journal: Journal,
    *,
    workers: int,
    kept: int,
    progress: Progress | None,
    committed: Callable[[str, Index | None], None],
    stopping: Callable[[], None],
) -> None:
    """Do the tasks; each is in the journal as soon as it is on the disk."""
    total = kept + sum(task.nbytes for task in tasks)
    done = kept
    if progress is not None:
        progress(done, total, "")

    def note(task: _Task, result: Any) -> None:
        nonlocal done
        name, index = task.enter(journal, result)
        committed(name, index)
        done += task.nbytes
        if progress is not None and index is not None:
            progress(done, total, name)

    with journal.appending():
        work_through(iter(tasks), lambda task: task.run(), note, workers=workers, stopping=stopping)


def _record(leaf: LeafSpec, journal: Journal) -> LeafRecord:
    digests = journal.chunks.get(leaf.path, {})
    return LeafRecord(
        layout=leaf.layout,
        chunk_digests=tuple(digests[index] for index in leaf.layout.chunk_indices()),
        sources=leaf.sources,
        rule=leaf.rule,
    )


def _complete(
    folder: Path, summary: WriteSummary, metadata: Mapping[str, Any], extra_files: Mapping[str, bytes]
) -> None:
    """Add to what Orbax has made: the extra files, and the manifest as the last one."""
    for name, content in extra_files.items():
        if not is_file_name(name) or name == MANIFEST_FILE or (folder / name).exists():
            raise ValueError(f"extra file {name!r}: not a plain name, or the name of a file or leaf of the checkpoint")
        write_file(folder / name, content)
    files = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_file():
            sync(entry)  # Orbax does not wait for the disk
            files[entry.name] = hashlib.sha256(entry.read_bytes()).hexdigest()
    manifest = Manifest(leaves=summary.records, files=files, metadata=metadata)
    write_file(folder / MANIFEST_FILE, manifest.to_bytes())
    sync(folder)
