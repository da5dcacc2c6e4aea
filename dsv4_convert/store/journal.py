"""The record of what an unfinished run has finished: ``journal*.jsonl`` in its stage."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Self

from dsv4_convert.errors import BadInput
from dsv4_convert.files.strict_json import parse_object, shown
from dsv4_convert.files.workspace import refuse_other_settings
from dsv4_convert.files.writing import write_atomically, writing
from dsv4_convert.store.digests import is_digest
from dsv4_convert.store.layout import Index


@dataclass
class Journal:
    """The record of finished chunks, and of JSON found during the run (side records).

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
            folder: the stage.
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
            if not end:  # cut off by a kill: ignored here, as it is on resuming
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
        except (BadInput, ValueError) as error:
            raise BadInput(f"{file}: the journal is damaged ({error}). Start again with --restart.") from error
        refuse_other_settings(file.parent, "conversion", then=found, now=self.plan)

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
        whole = self.folder / "journal.jsonl"
        write_atomically(whole, self.whole())
        with writing(whole):
            for file in self._files():
                if file != whole:
                    file.unlink()

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
