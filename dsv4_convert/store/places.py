"""Where a checkpoint grows and appears: a folder, or a prefix of a bucket."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from dsv4_convert.disk import free_bytes, nearest_folder
from dsv4_convert.errors import ResourceError, UsageError
from dsv4_convert.locks import lock
from dsv4_convert.store.arrays import Array, ArrayWriter, Compression, create_array, is_local, sync, writing
from dsv4_convert.store.layout import MANIFEST_FILE, ArrayLayout, Index
from dsv4_convert.store.staging import Journal, Staging, staged_bytes, staging_area

#: A local path, or the path in a bucket that etils.epath makes of a URL, which has the methods used here.
AnyPath: TypeAlias = Path

#: Name of a folder for a moment, before its random part.
_SCRATCH = ".dsv4-probe-"


class ChunkWriter(Protocol):
    """Writes the chunks of one array; threads and processes may write at once."""

    def write_chunk(self, index: Index, chunk: Array) -> None:
        """Write a chunk durably; it is C-contiguous, of the layout's dtype and the clipped shape."""


class Place(Protocol):
    """A destination, and the work that is done beside it."""

    @property
    def target(self) -> AnyPath:
        """Where the checkpoint will be."""

    def check(self, *, overwrite: bool) -> None:
        """Raise :class:`UsageError` if something is at the destination that must not be replaced."""

    def held(self) -> AbstractContextManager[None]:
        """Keep others from writing the same destination. Raises :class:`ResourceError` if one does."""

    def clear(self) -> None:
        """Discard what an interrupted run left."""

    def prepare(self, layouts: Mapping[str, ArrayLayout], *, plan: Mapping[str, Any], compression: Compression) -> None:
        """Make an array for every leaf, and journal and arrays agree, whatever an interrupted run left."""

    def journal(self, plan: Mapping[str, Any], member: int) -> Journal:
        """What all processes have recorded so far, for process ``member`` to go on."""

    def writer(self, path: str, layout: ArrayLayout, compression: Compression) -> ChunkWriter:
        """Of the chunks of a leaf."""

    def committing(self, layouts: Mapping[str, ArrayLayout], compression: Compression) -> AbstractContextManager[Path]:
        """Let Orbax make a checkpoint of the leaves; its local folder can be added to before all of it appears."""

    def free(self) -> int | None:
        """Bytes that are free, those written by an interrupted run included; None where there is no end."""

    def device(self) -> int | None:
        """What tells whether something else is on the same disk; None for a bucket."""

    def probe(self, chunk: Array, count: int, compression: Compression) -> tuple[float, int]:
        """Write a chunk ``count`` times and remove it again: seconds, and bytes that were stored."""


class Folder:
    """A local destination: everything is written beside it, and it appears by one rename."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._staging = Staging.beside(target)

    @property
    def target(self) -> Path:
        return self._target

    def check(self, *, overwrite: bool) -> None:
        if not os.path.lexists(self._target):
            return
        if not overwrite:
            raise UsageError(
                f"{self._target}: exists already. Choose another destination, remove it, or allow overwriting."
            )
        if not (self._target / MANIFEST_FILE).is_file():
            raise UsageError(
                f"{self._target}: not overwritten, because it is not a checkpoint of dsv4 (no {MANIFEST_FILE})."
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        with staging_area(self._target):
            yield

    def clear(self) -> None:
        self._staging.clear()

    def prepare(self, layouts: Mapping[str, ArrayLayout], *, plan: Mapping[str, Any], compression: Compression) -> None:
        self._staging.prepare(layouts, plan=plan, compression=compression)

    def journal(self, plan: Mapping[str, Any], member: int) -> Journal:
        return Journal.open(self._staging.folder, plan=plan, member=member)

    def writer(self, path: str, layout: ArrayLayout, compression: Compression) -> ChunkWriter:
        return ArrayWriter(self._staging.leaf(path), layout, compression)

    @contextmanager
    def committing(self, layouts: Mapping[str, ArrayLayout], compression: Compression) -> Iterator[Path]:
        from dsv4_convert.store.orbax_commit import commit_arrays

        folders = {path: self._staging.leaf(path) for path in layouts}
        for folder in folders.values():
            sync(folder)
        sync(self._staging.leaves)
        commit_arrays(folders, self._staging.commit)
        yield self._staging.commit
        self._staging.publish(self._target)

    def free(self) -> int | None:
        return free_bytes(self._target.parent) + staged_bytes(self._target)

    def device(self) -> int | None:
        return nearest_folder(self._target.parent).stat().st_dev

    def probe(self, chunk: Array, count: int, compression: Compression) -> tuple[float, int]:
        layout = ArrayLayout(shape=(count, *chunk.shape), dtype=chunk.dtype, chunk_shape=(1, *chunk.shape))
        with _scratch(nearest_folder(self._target.parent)) as scratch:
            create_array(scratch / "probe", layout, compression)
            seconds = timed_writes(ArrayWriter(scratch / "probe", layout, compression), layout.chunk_indices(), chunk)
            return seconds, sum(file.stat().st_size for file in (scratch / "probe").iterdir())


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A folder for a moment. Those that killed processes left are removed, which their free locks tell."""
    for left in parent.glob(f"{_SCRATCH}*"):
        with suppress(OSError, ResourceError), _open_folder(left) as descriptor:
            if lock(descriptor, left):
                shutil.rmtree(left)
    with ExitStack() as opened:
        folder = None
        while folder is None:
            with writing(parent):
                made = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=parent))
            with writing(made), suppress(FileNotFoundError):
                descriptor = opened.enter_context(_open_folder(made))
                # Another process may take it for left before it is locked, and hold it to remove it, or have done so.
                if _ours(descriptor, made) and made.exists():
                    folder = made
        try:
            yield folder
        finally:
            with writing(folder):
                shutil.rmtree(folder)


def _ours(descriptor: int, folder: Path) -> bool:
    try:
        return lock(descriptor, folder)
    except ResourceError:  # where there are no locks nothing is removed either
        return True


@contextmanager
def _open_folder(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def timed_writes(writer: ChunkWriter, indices: Iterable[Index], chunk: Array) -> float:
    """Seconds to write the same chunk as each of a stack."""
    start = time.perf_counter()
    for index in indices:
        writer.write_chunk(index, chunk[None])
    return max(time.perf_counter() - start, 1e-6)


def as_path(place: str | os.PathLike[str]) -> AnyPath:
    """A path to read from or write to: local, or of a bucket for a URL such as ``gs://bucket/model``.

    Raises:
        UsageError: a URL of something that is not supported, or whose library is not installed.
    """
    text = os.fspath(place)
    if "://" not in text:
        return Path(os.path.abspath(text))
    from dsv4_convert.store.bucket import bucket_path

    return bucket_path(text)


def place_of(destination: str | os.PathLike[str]) -> Place:
    """The place of a destination, as a path or a URL.

    Raises:
        UsageError: as :func:`as_path`, or a name that is not text in this locale, which Orbax and tensorstore ask for.
    """
    try:
        os.fspath(destination).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{destination}: not a name in UTF-8; choose another, or set a locale that has it, such as LC_ALL=C.UTF-8"
        ) from None
    path = as_path(destination)
    if is_local(path):
        return Folder(path)
    from dsv4_convert.store.bucket import Bucket

    return Bucket(path)
