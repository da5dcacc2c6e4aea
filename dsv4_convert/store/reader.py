"""Open a checkpoint, read leaves or parts of them, and check every byte against the manifest.

Needs NumPy only (and tensorstore for compressed leaves): opening reads one file and imports neither JAX nor Orbax.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.folders import not_converted
from dsv4_convert.spec.conversion import Conversion
from dsv4_convert.store.arrays import Array, StoredArray
from dsv4_convert.store.digests import digest_of
from dsv4_convert.store.layout import (
    MANIFEST_FILE,
    ArrayLayout,
    Index,
    Region,
    bounded,
    chunk_digest,
    chunk_file,
    nested,
)
from dsv4_convert.store.locate import as_path
from dsv4_convert.store.manifest import Manifest
from dsv4_convert.store.threads import in_threads

#: Called after every chunk with (bytes checked, bytes in total, path of the leaf).
VerifyProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Store:
    """A complete checkpoint, read-only. Threads may share it."""

    folder: Path
    manifest: Manifest

    @property
    def paths(self) -> tuple[str, ...]:
        """Dotted paths of all leaves, sorted."""
        return tuple(sorted(self.manifest.leaves))

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The metadata that the writer of the checkpoint stored."""
        return self.manifest.metadata

    @cached_property
    def conversion(self) -> Conversion:
        """The metadata of a conversion, decoded. Raises :class:`BadInput` if they are not those of one."""
        return Conversion.from_metadata(self.metadata, where=str(self.folder / MANIFEST_FILE))

    def leaf(self, path: str) -> ArrayLayout:
        """Shape, dtype and chunk shape of a leaf, without reading it.

        Raises:
            UsageError: there is no such leaf.
        """
        if path not in self.manifest.leaves:
            raise UsageError(f"{self.folder}: has no leaf {path!r}; its leaves begin {', '.join(self.paths[:3])}")
        return self.manifest.leaves[path].layout

    def read(self, path: str, index: int | slice | None = None) -> Array:
        """A leaf, or an entry or a range of its first axis (one expert, some rows).

        Args:
            path: dotted path of the leaf.
            index: None for all of it; an integer drops the first axis, a slice of step 1 keeps it. Reads only the
                chunks concerned, and of uncompressed row chunks only the bytes concerned.

        Returns:
            A new array of the leaf's dtype. Its content is not compared with the digests: see :func:`verify`.

        Raises:
            UsageError: there is no such leaf.
            IndexError, ValueError: the index is outside the leaf, or the slice has a step.
            BadInput: the stored shape, dtype or chunk shape is not what the manifest says, or the data are damaged.
        """
        layout = self.leaf(path)
        if index is None:
            return self.open_leaf(path).read_rows(0, layout.shape[0] if layout.shape else 1)
        if not layout.shape:
            raise IndexError(f"{path} is a scalar and cannot be indexed")
        rows = layout.shape[0]
        if isinstance(index, slice):
            start, stop, step = index.indices(rows)
            if step != 1:
                raise ValueError(f"{path}: a slice must have step 1, got {index}")
            return self.open_leaf(path).read_rows(start, max(start, stop))
        at = index + rows if index < 0 else index
        if not 0 <= at < rows:
            raise IndexError(f"{path}: index {index} is outside its {rows} rows")
        return self.open_leaf(path).read_rows(at, at + 1)[0, ...]

    def read_region(self, path: str, region: Region) -> Array:
        """A part of a leaf: one slice for every axis. Reads only the bytes concerned, of compressed chunks these.

        Raises:
            UsageError, BadInput: as :meth:`read`.
            ValueError: as :func:`~dsv4_convert.store.layout.bounded`.
        """
        return self.open_leaf(path).read_region(bounded(region, self.leaf(path).shape))

    def read_tree(self, prefix: str = "") -> dict[str, Any]:
        """All leaves below ``prefix`` as a nested dict without it: ``read_tree("layers.0")["attn"]["wq_a"]``.

        Raises:
            UsageError: there is no leaf below ``prefix``.
            BadInput: as :meth:`read`.
        """
        start = f"{prefix}." if prefix else ""
        below = [path for path in self.paths if path.startswith(start)]
        if not below:
            raise UsageError(f"{self.folder}: has no leaf below {prefix!r}")
        return nested({path.removeprefix(start): self.read(path) for path in below})

    def read_file(self, name: str) -> bytes:
        """Content of another file of the checkpoint, such as ``config.json``, compared with its digest.

        Raises:
            UsageError: the manifest names no such file.
            BadInput: the file is absent or was changed.
        """
        if name not in self.manifest.files:
            raise UsageError(f"{self.folder}: has no file {name!r}; it has {', '.join(self.manifest.files)}")
        path = self.folder / name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
        expected = self.manifest.files[name]
        if (found := digest_of(content, like=expected)) != expected:
            raise BadInput(f"{path}: changed or damaged: digest {found}, the manifest says {expected}")
        return content

    def open_leaf(self, path: str) -> StoredArray:
        """The stored array of a leaf, whose own metadata are the manifest's. (Orbax would not notice a difference.)

        Raises:
            BadInput: they are not, or cannot be read.
        """
        stored = StoredArray.open(self.folder / path)
        expected = self.manifest.leaves[path].layout
        if stored.layout != expected:
            raise BadInput(
                f"{stored.folder}: stored as {_describe(stored.layout)}, but the manifest says {_describe(expected)}"
            )
        return stored


def open_store(path: str | os.PathLike[str]) -> Store:
    """Open the checkpoint at ``path``; reads the manifest only.

    Raises:
        BadInput: there is none, it is still being written, or its manifest is damaged.
    """
    folder = as_path(path)
    manifest = folder / MANIFEST_FILE
    try:
        return Store(folder, Manifest.from_bytes(manifest.read_bytes(), where=str(manifest)))
    except OSError as error:
        if manifest.exists():
            raise BadInput(f"{manifest}: cannot be read ({error.strerror}); check its permissions") from error
        raise BadInput(f"{folder}: {not_converted(folder, os.fspath(path))}") from error


def verify(
    store: Store, progress: VerifyProgress | None = None, *, leaves: Iterable[str] | None = None, workers: int = 2
) -> list[str]:
    """Hash everything that is stored, or only some leaves by their paths, and compare it with the manifest.

    Memory: one chunk per worker (two of an edge chunk or a compressed one).

    Returns:
        One line for every difference: chunks, arrays' metadata, files; empty when all is as it was written.
    """
    problems = []
    chosen = store.paths if leaves is None else tuple(leaves)
    for name in sorted(store.manifest.files) if leaves is None else ():
        try:
            store.read_file(name)
        except BadInput as error:
            problems.append(str(error))
    total = sum(store.leaf(path).nbytes for path in chosen)
    checked = 0

    def chunks() -> Iterator[_ChunkTask]:
        for path in chosen:
            try:
                stored = store.open_leaf(path)
            except BadInput as error:
                problems.append(str(error))
                continue
            digests = store.manifest.leaves[path].chunk_digests
            for index, digest in zip(stored.layout.chunk_indices(), digests, strict=True):
                yield _ChunkTask(path, stored, index, digest)

    with in_threads(_ChunkTask.problem, chunks(), workers=workers) as done:
        for task, problem in done:
            if problem is not None:
                problems.append(problem)
            checked += math.prod(task.stored.layout.clipped_shape(task.index)) * task.stored.layout.dtype.itemsize
            if progress is not None:
                progress(checked, total, task.path)
    return sorted(problems)


@dataclass(frozen=True)
class _ChunkTask:
    path: str
    stored: StoredArray
    index: Index
    digest: str

    def problem(self) -> str | None:
        """What is wrong with the chunk, padding included, or None."""
        stored, index = self.stored, self.index
        file = stored.folder / chunk_file(index)
        try:
            chunk = stored.read_chunk(index)
            padding_damaged = stored.padding_is_damaged(index)
        except BadInput as error:
            return str(error)
        if (found := chunk_digest(chunk, like=self.digest)) != self.digest:
            return f"{file}: changed or damaged: {self.path}, chunk {index}: digest {found}, expected {self.digest}"
        if padding_damaged:
            return f"{file}: damaged outside the array: {self.path}, chunk {index}: the padding is not zero"
        return None


def _describe(layout: ArrayLayout) -> str:
    return f"{layout.dtype} {layout.shape} in chunks of {layout.chunk_shape}"
