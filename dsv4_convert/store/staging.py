"""The folder beside the destination in which a checkpoint grows: its lock, its journal and its way to the destination.

::

    DEST.dsv4-partial/
      lock            held with flock while a process writes; the system releases it when the process ends
      journal*.jsonl  the plan, then a line for every finished chunk and side record; one file for each writing process
      leaves/PATH/    arrays, finished or not
      commit*         the checkpoint while Orbax builds it (with Orbax's suffix) and until it is published
      replaced        the former destination while it is being overwritten

A kill at any moment leaves one of these states, and :func:`staging_area` and :meth:`Staging.prepare` lead every one of
them back to "the chunks of the journal in ``leaves/``". Only a rename makes the destination appear.
An export uses the same folder: its shards grow in ``commit``, and ``export.json`` is its journal.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Self

from dsv4_convert.errors import BadInput, ResourceError, UsageError, listed
from dsv4_convert.locks import lock as locked
from dsv4_convert.store.arrays import Compression, StoredArray, create_array, sync, write_file, writing
from dsv4_convert.store.layout import ARRAY_METADATA_FILE, ArrayLayout, Index, chunk_file, is_digest
from dsv4_convert.strict_json import parse_object, shown
from dsv4_convert.unfinished import LOCK_NAME, busy, folder_of, held, is_open

#: The journal of an export.
EXPORT_STATE = "export.json"
#: Every name that conversions and exports use in the folder.
_OWN = re.compile(r"lock|journal.*\.jsonl|journal\.new|leaves|commit.*|replaced|export\.json|export\.new")


@dataclass(frozen=True)
class Staging:
    """The staging folder of one destination. Its methods are for the holder of the lock."""

    folder: Path

    @classmethod
    def beside(cls, destination: Path) -> Self:
        """The staging folder that belongs to ``destination``, whether it exists or not."""
        return cls(folder_of(destination))

    @property
    def leaves(self) -> Path:
        return self.folder / "leaves"

    @property
    def commit(self) -> Path:
        return self.folder / "commit"

    @property
    def replaced(self) -> Path:
        return self.folder / "replaced"

    def leaf(self, path: str) -> Path:
        """Where the array of a leaf is written."""
        return self.leaves / path

    def prepare(self, layouts: Mapping[str, ArrayLayout], *, plan: Mapping[str, Any], compression: Compression) -> None:
        """Make a folder for every leaf, and journal and folders agree, whatever an interrupted run left.

        Raises:
            UsageError: an unfinished export is here; or as :meth:`Journal.open`.
            BadInput: as :meth:`Journal.open`.
            ResourceError: the disk is full or failing.
        """
        if os.path.lexists(self.folder / EXPORT_STATE):
            raise UsageError(
                f"{self.folder}: an unfinished export is here ({EXPORT_STATE}). Finish it with the same `dsv4 convert "
                "orbax-to-hf`, choose another destination, or --restart to discard it."
            )
        journal = Journal.open(self.folder, plan=plan)
        self._take_back_leaves()
        chunks: dict[str, dict[Index, str]] = {}
        for path, layout in layouts.items():
            kept = self._reconcile(self.leaf(path), layout, compression, journal.chunks.get(path, {}))
            if kept:
                chunks[path] = kept
        journal.chunks = chunks
        journal.rewrite()

    def _take_back_leaves(self) -> None:
        """Undo an unfinished commit: arrays go back to ``leaves/``, Orbax's own files are removed."""
        with writing(self.folder):
            self.leaves.mkdir(exist_ok=True)
            for commit in self.folder.glob("commit*"):
                for entry in commit.iterdir():
                    if entry.is_dir() and not self.leaf(entry.name).exists():
                        entry.rename(self.leaf(entry.name))
                shutil.rmtree(commit)

    def _reconcile(
        self, folder: Path, layout: ArrayLayout, compression: Compression, digests: Mapping[Index, str]
    ) -> dict[Index, str]:
        """Those of the chunks with these digests that are there; whatever else lies in the leaf's folder is removed."""
        with writing(folder):
            if not folder.exists():
                create_array(folder, layout, compression)
                return {}
            try:
                stored = StoredArray.open(folder)
                intact = stored.layout == layout and stored.compression == compression
            except BadInput:
                intact = False
            if not intact:
                shutil.rmtree(folder)
                create_array(folder, layout, compression)
                return {}
            missing = set(stored.missing_chunks())
            kept = {index: digest for index, digest in digests.items() if chunk_file(index) not in missing}
            names = {ARRAY_METADATA_FILE, *map(chunk_file, kept)}
            for entry in folder.iterdir():
                if entry.name not in names:
                    entry.unlink()
            return kept

    def clear(self) -> None:
        """Discard everything but the lock."""
        with writing(self.folder):
            for entry in self.folder.iterdir():
                if entry.name == LOCK_NAME:
                    continue
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()

    def remove_if_empty(self) -> None:
        """Remove the folder if nothing but the lock is in it, and if that is possible: it does no harm."""
        with suppress(OSError):
            if [entry.name for entry in self.folder.iterdir()] == [LOCK_NAME]:
                shutil.rmtree(self.folder)

    def undo_half_publishing(self, destination: Path) -> None:
        """Clean up after a kill inside :meth:`publish`: before the last rename, or after it."""
        with writing(destination):
            if self.replaced.exists() and not os.path.lexists(destination):
                self.replaced.rename(destination)
        if not self.leaves.exists() and not any(self.folder.glob("commit*")):
            self.clear()

    def publish(self, destination: Path) -> None:
        """Rename the finished checkpoint to ``destination``; what was there before is removed afterwards."""
        with writing(destination):
            shutil.rmtree(self.leaves)  # empty, for the arrays are in the commit
            sync(self.commit)
            if os.path.lexists(destination):
                destination.rename(self.replaced)
            self.commit.rename(destination)
            sync(destination.parent)
        try:
            self.clear()
            shutil.rmtree(self.folder)  # the lock last: nobody comes in before
        except (OSError, ResourceError) as error:
            reason = error.__cause__ or error
            raise ResourceError(
                f"{destination}: complete, but {self.folder} cannot be removed ({reason}); remove it yourself"
            ) from error


def staged_bytes(destination: Path) -> int:
    """Bytes of the chunks that an interrupted run has left for ``destination``."""
    leaves = Staging.beside(destination).leaves
    return sum(entry.stat().st_size for folder in _folders(leaves) for entry in os.scandir(folder))


def _folders(parent: Path) -> list[str]:
    try:
        return [entry.path for entry in os.scandir(parent) if entry.is_dir()]
    except FileNotFoundError:
        return []


@contextmanager
def staging_area(destination: Path) -> Iterator[Staging]:
    """Create or reopen the staging folder of ``destination`` and hold its locks.

    Raises:
        UsageError: something else is in the folder, such as an unfinished recording.
        ResourceError: another process holds the lock, or the folder cannot be created.
    """
    staging = Staging.beside(destination)
    lock = staging.folder / LOCK_NAME
    while True:
        with held(staging.folder, _OWN, locks_a_file=True):
            with writing(lock):
                try:
                    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                except FileNotFoundError:  # the other writer finished and removed the folder just now
                    continue
            try:
                if not locked(descriptor, lock):
                    raise busy(staging.folder)
                if not is_open(descriptor, lock):
                    continue
                with writing(lock):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                staging.undo_half_publishing(destination)
                try:
                    yield staging
                finally:
                    staging.remove_if_empty()
                return
            finally:
                os.close(descriptor)


@dataclass
class Journal:
    """The record of finished chunks, and of JSON that was found out on the way (side records).

    A line is written after its chunk is on the disk, so that no power cut leaves a line without its chunk. The lines
    themselves are not waited for: one that is lost costs the work of a chunk. The first line of every file holds the
    plan. A last line that was cut off by a kill is dropped.
    """

    folder: Path
    plan: Mapping[str, Any]
    #: Number of the process that appends; each has a file of its own.
    member: int = 0
    chunks: dict[str, dict[Index, str]] = field(default_factory=dict)
    side_records: dict[str, Any] = field(default_factory=dict)
    _stream: FileIO | None = None

    @classmethod
    def open(cls, folder: Path, *, plan: Mapping[str, Any], member: int = 0) -> Self:
        """Read what all processes have recorded.

        Args:
            folder: the staging folder.
            plan: JSON that must be the same for the finished chunks to be used again.
            member: number of this process.

        Raises:
            UsageError: the journal belongs to another plan.
            BadInput: the journal is damaged.
        """
        journal = cls(folder, plan, member)
        for file in journal._files():
            journal._read(file)
        return journal

    @classmethod
    def found(cls, folder: Path) -> Self:
        """Whatever the journal in ``folder`` says, of whatever plan; for looking only.

        Raises:
            BadInput: there is none, or none that has its first line yet, or it is damaged.
        """
        for file in sorted(folder.glob("journal*.jsonl")):
            first, end, _ = file.read_bytes().partition(b"\n")
            if not end:  # cut off by a kill: as when the run goes on, it says nothing
                continue
            try:
                plan = parse_object(first, where="line", infinite=True)
            except BadInput as error:
                raise BadInput(f"{file}: the journal is damaged ({error}). Start again with --restart.") from error
            return cls.open(folder, plan=plan)
        raise BadInput(
            f"{folder}: no journal that says anything, so not an unfinished conversion, or one that had hardly begun; "
            "the same command begins again"
        )

    @property
    def _file(self) -> Path:
        return self.folder / (f"journal-{self.member}.jsonl" if self.member else "journal.jsonl")

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("journal*.jsonl"))

    def _read(self, file: Path) -> None:
        data = file.read_bytes()
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        if not lines:
            return
        try:
            found, *entries = (parse_object(line, where="line", infinite=True) for line in lines)
            for entry in entries:
                self._enter(entry)
            differing = [
                f"{key}: {found.get(key)!r} then, {self.plan.get(key)!r} now"
                for key in sorted({*found, *self.plan})
                if found.get(key) != self.plan.get(key)
            ]
        except (BadInput, ValueError) as error:
            raise BadInput(f"{file}: the journal is damaged ({error}). Start again with --restart.") from error
        if differing:
            raise UsageError(
                f"{file.parent}: an unfinished conversion with other settings is here:\n{listed(differing)}\n"
                "Run with the former settings and source to finish it, or --restart to discard it."
            )

    def _enter(self, entry: Mapping[str, Any]) -> None:
        """Take up one line. Raises :class:`ValueError`."""
        match entry:
            case {"note": str(name), "value": value}:
                self.side_records[name] = value
            case {"leaf": str(path), "chunk": [*index], "digest": str(digest)} if is_digest(digest) and all(
                type(at) is int and at >= 0 for at in index
            ):
                self.chunks.setdefault(path, {})[tuple(index)] = digest
            case _:
                raise ValueError(f"neither a chunk nor a side record: {shown(str(entry))}")

    def first_line(self) -> bytes:
        """The line that every file begins with."""
        return _line(self.plan)

    def whole(self) -> bytes:
        """One file of all that ``chunks`` and ``side_records`` say now."""
        lines = [_chunk_line(path, index, digest) for path, of in self.chunks.items() for index, digest in of.items()]
        lines += [_side_line(name, value) for name, value in self.side_records.items()]
        return b"".join([self.first_line(), *lines])

    def rewrite(self) -> None:
        """Make one file of all."""
        whole, new = self.folder / "journal.jsonl", self.folder / "journal.new"
        write_file(new, self.whole())
        with writing(whole):
            new.rename(whole)
            for file in self._files():
                if file != whole:
                    file.unlink()
        sync(self.folder)

    @contextmanager
    def appending(self) -> Iterator[None]:
        """Chunks and side records can be added in this block."""
        with writing(self._file):
            stream = FileIO(self._file, "a")  # unbuffered: what was added survives a kill of the process
        with stream:
            self._stream = stream
            if not stream.tell():
                self._append(self.first_line())
            yield

    def add_chunk(self, path: str, index: Index, digest: str) -> None:
        """Record a chunk. It must be on the disk already."""
        self.chunks.setdefault(path, {})[index] = digest
        self._append(_chunk_line(path, index, digest))

    def add_side_record(self, name: str, value: Any) -> None:
        """Record JSON under a name."""
        self.side_records[name] = value
        self._append(_side_line(name, value))

    def _append(self, line: bytes) -> None:
        stream, left = self._stream, memoryview(line)
        assert stream is not None
        with writing(self._file):
            end = stream.tell()
            try:
                while left:
                    left = left[stream.write(left) :]
            except OSError:  # half a line, and another thread may add one after it
                stream.truncate(end)
                raise


def _chunk_line(path: str, index: Index, digest: str) -> bytes:
    return _line({"leaf": path, "chunk": list(index), "digest": digest})


def _side_line(name: str, value: Any) -> bytes:
    return _line({"note": name, "value": value})


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True).encode() + b"\n"
