"""The folder beside the destination in which a checkpoint grows: its lock, its journal and its way to the destination.

::

    DEST.dsv4-partial/
      lock            held with flock while a process writes; the system releases it when the process ends
      journal.jsonl   the plan, then one line for every finished leaf
      leaves/PATH/    arrays, finished or not
      commit*         the checkpoint while Orbax builds it (with Orbax's suffix) and until it is published
      replaced        the former destination while it is being overwritten

A kill at any moment leaves one of these states, and :func:`staging_area` and :meth:`Staging.take_back_leaves` lead
every one of them back to "finished leaves in ``leaves/``". Only a rename makes the destination appear.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4_convert.errors import BadInput, ResourceError, UsageError, listed
from dsv4_convert.store.arrays import sync, writing

SUFFIX = ".dsv4-partial"


@dataclass(frozen=True)
class Staging:
    """The staging folder of one destination. Its methods are for the holder of the lock."""

    folder: Path

    @property
    def journal_file(self) -> Path:
        return self.folder / "journal.jsonl"

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

    def take_back_leaves(self) -> None:
        """Undo an unfinished commit: arrays go back to ``leaves/``, Orbax's own files are removed."""
        self.leaves.mkdir(exist_ok=True)
        for commit in self.folder.glob("commit*"):
            for entry in commit.iterdir():
                if entry.is_dir() and not self.leaf(entry.name).exists():
                    entry.rename(self.leaf(entry.name))
            shutil.rmtree(commit)

    def clear(self) -> None:
        """Discard everything but the lock."""
        for entry in self.folder.iterdir():
            if entry.name == "lock":
                continue
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def remove_if_empty(self) -> None:
        """Remove the folder if nothing but the lock is in it."""
        if self.folder.exists() and [entry.name for entry in self.folder.iterdir()] == ["lock"]:
            shutil.rmtree(self.folder)

    def undo_half_publishing(self, destination: Path) -> None:
        """Clean up after a kill inside :meth:`publish`: before the last rename, or after it."""
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
        shutil.rmtree(self.folder)


@contextmanager
def staging_area(destination: Path) -> Iterator[Staging]:
    """Create or reopen the staging folder of ``destination`` and hold its lock.

    Raises:
        ResourceError: another process holds the lock, or the folder cannot be created.
    """
    staging = Staging(destination.with_name(destination.name + SUFFIX))
    lock = staging.folder / "lock"
    while True:
        with writing(staging.folder):
            staging.folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the other writer finished and removed the folder just now
            continue
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
                raise ResourceError(
                    f"{destination}: another process (pid {holder}) is writing it and holds {lock}. "
                    "Wait for it, or end it and run the same command again."
                ) from error
            if not _is_open_file(descriptor, lock):
                continue
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


def _is_open_file(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still is the file that was locked; not so if its holder finished and removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


class Journal:
    """The record of finished leaves: a line is on the disk before its leaf counts as finished.

    The first line holds the plan. A last line that was cut off by a kill is dropped.
    """

    def __init__(self, path: Path, *, plan: Mapping[str, Any]) -> None:
        """Open the journal of this plan, or begin it.

        Args:
            path: the journal's file.
            plan: JSON that must be the same for the finished leaves to be used again.

        Raises:
            UsageError: the journal belongs to another plan.
            BadInput: the journal is damaged.
        """
        self._path = path
        self.finished: dict[str, tuple[str, ...]] = {}
        lines = self._complete_lines()
        if not lines:
            self._append(plan, mode="wb")
            sync(path.parent)
            return
        try:
            found, *entries = map(json.loads, lines)
            self.finished = {entry["leaf"]: tuple(entry["chunk_digests"]) for entry in entries}
            differing = [
                f"{key}: {found.get(key)!r} then, {plan.get(key)!r} now"
                for key in sorted({*found, *plan})
                if found.get(key) != plan.get(key)
            ]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadInput(f"{path}: the journal is damaged ({error}). Start again with restart.") from error
        if differing:
            raise UsageError(
                f"{path.parent}: an unfinished conversion with other settings is here:\n{listed(differing)}\n"
                "Run with the former settings to finish it, or restart to discard it."
            )

    def _complete_lines(self) -> Sequence[bytes]:
        if not self._path.exists():
            return ()
        data = self._path.read_bytes()
        complete = data.rfind(b"\n") + 1
        if complete < len(data):
            os.truncate(self._path, complete)
        return data[:complete].splitlines()

    def append(self, leaf: str, chunk_digests: Sequence[str]) -> None:
        """Record durably that ``leaf`` is finished. Its array must be on the disk already."""
        self._append({"leaf": leaf, "chunk_digests": list(chunk_digests)}, mode="ab")

    def _append(self, entry: Mapping[str, Any], *, mode: str) -> None:
        with writing(self._path), open(self._path, mode) as file:
            file.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
