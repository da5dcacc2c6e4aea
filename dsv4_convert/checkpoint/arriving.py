"""A checkpoint whose shards arrive while it is read: the part that does not depend on where they come from."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv4_convert.checkpoint.files import file_digest, set_aside, stamp_of, stat_regular
from dsv4_convert.checkpoint.folder import Checkpoint
from dsv4_convert.checkpoint.header import Header
from dsv4_convert.checkpoint.hub_progress import Meter, Stopped
from dsv4_convert.checkpoint.index import SHARD_SUFFIX
from dsv4_convert.checkpoint.planned import PlannedFile
from dsv4_convert.errors import BadInput

#: Shards that are on disk, or on their way, and not given up yet, where each is given up after its use.
AHEAD = 3
TRANSFERS = 4


class ArrivingCheckpoint(Checkpoint):
    """Reading a tensor waits until its shard is on disk, and has the size and the hash that are stated for it.

    Shards come in the order given to :meth:`start`. A shard that is waited for comes next, whatever the order says, so
    that no order can lead to a standstill.

    Attributes:
        files: everything that belongs to the checkpoint.
        discard: whether shards that were fetched for this checkpoint are deleted after their use.
        fetched: bytes that have arrived so far.
        on_bytes: called when some more have.
    """

    def __init__(
        self,
        *,
        root: Path,
        config: Mapping[str, Any],
        headers: Sequence[Header],
        absent: frozenset[str],
        revision: str | None,
        files: Sequence[PlannedFile],
        discard: bool,
    ) -> None:
        super().__init__(root=root, config=config, headers=headers, absent=absent, revision=revision)
        self.files = tuple(files)
        self.discard = discard
        self.fetched = 0
        self.on_bytes: Callable[[], None] = lambda: None
        self._by_name = {file.name: file for file in files}
        self._change = threading.Condition()
        self._order: list[str] = []
        self._urgent: list[str] = []
        self._begun: set[str] = set()
        self._here: set[str] = set()
        self._finished: set[str] = set()
        self._failure: BaseException | None = None
        self._meter = Meter("download", self.to_fetch, self._count)
        self._threads: list[threading.Thread] = []

    @property
    def digests(self) -> Mapping[str, str]:
        """SHA-256 of the shards, by name, as far as their origin states them."""
        return {name: file.oid for name, file in self._by_name.items() if file.oid is not None and len(file.oid) == 64}

    @property
    def shard_files(self) -> tuple[PlannedFile, ...]:
        """Those of the files that are shards."""
        return tuple(file for file in self.files if file.name.endswith(SHARD_SUFFIX))

    @property
    def to_fetch(self) -> int:
        """Bytes that are still to come."""
        return sum(file.size for file in self.files if not file.cached)

    @property
    def most_on_disk(self) -> int:
        """Bytes that its files will still take, at most, at a time."""
        sizes = sorted((file.size for file in self.files if not file.cached), reverse=True)
        return sum(sizes[:AHEAD]) if self.discard else sum(sizes)

    def fetch_small_files(self) -> None:
        """Fetch what belongs to the checkpoint beside the shards: config, index, tokenizer."""
        for file in self.files:
            if not file.name.endswith(SHARD_SUFFIX):
                self._fetch(file)

    def start(self, order: Sequence[str]) -> None:
        """Begin to fetch these shards, in this order, in the background."""
        with self._change:
            self._order += order
            self._change.notify_all()
            if not self._threads:
                self._threads = [
                    threading.Thread(target=self._work, name=f"dsv4-fetch-{number}", daemon=True)
                    for number in range(TRANSFERS)
                ]
                for thread in self._threads:
                    thread.start()

    def finish(self, shard: str) -> None:
        """Nothing of this shard is needed any more: with ``discard`` it is deleted, if it was fetched."""
        with self._change:
            self._finished.add(shard)
            self._change.notify_all()
        if self.discard:
            self.forget(self.root / shard)
            self._delete(shard)

    def stop(self) -> None:
        """End all transfers; whoever waits for a shard, or reads one that is not here, gets an error."""
        with self._change:
            if self._failure is None:
                self._failure = Stopped()
            self._change.notify_all()
        self._meter.stop()

    def close(self) -> None:
        """As :meth:`Checkpoint.close`, and wait for the threads."""
        self.stop()
        for thread in self._threads:
            thread.join()
        super().close()

    def _arrive(self, file: Path) -> None:
        name = file.name
        with self._change:
            if name not in self._begun and name not in self._urgent:
                self._urgent.append(name)
                self.start(())
            self._change.wait_for(lambda: name in self._here or self._failure is not None)
            if name not in self._here and self._failure is not None:
                raise self._failure

    def _work(self) -> None:
        """One thread: take the next shard, fetch it, check it."""
        while (name := self._take()) is not None:
            try:
                self._fetch_and_check(self._by_name[name])
            except BaseException as error:
                with self._change:
                    self._failure = self._failure or error
                    self._change.notify_all()
                return
            with self._change:
                self._here.add(name)
                self._change.notify_all()

    def _take(self) -> str | None:
        """The next shard to fetch, when there is one and room for it; None when all ends."""
        with self._change:
            while self._failure is None:
                if self._urgent:
                    name = self._urgent.pop(0)
                elif self._order and (not self.discard or len(self._begun - self._finished) < AHEAD):
                    name = self._order.pop(0)
                else:
                    self._change.wait()
                    continue
                if name not in self._begun:
                    self._begun.add(name)
                    return name
            return None

    def _fetch_and_check(self, file: PlannedFile) -> None:
        """Once more from the beginning, if what is on disk is not what the Hub states."""
        path = self._fetch(file)
        problem = self._problem(file, path)
        if problem is not None:
            path = self._fetch(file, force=True)
            problem = self._problem(file, path)
        if problem is not None:
            set_aside(path)
            raise BadInput(f"{self.repository}: {problem}, also when it was fetched again")
        self._stamps[self.root / file.name] = stamp_of(stat_regular(path))

    def _problem(self, file: PlannedFile, path: Path) -> str | None:
        size = stat_regular(path).st_size
        if size != file.size:
            return f"{path}: expected {file.size:,} bytes, found {size:,}"
        if file.oid is None or len(file.oid) != 64:
            return None
        found = file_digest(path, on_bytes=lambda _: self._check_going_on())
        return None if found == file.oid else f"{path}: expected sha256 {file.oid}, found {found}"

    def _check_going_on(self) -> None:
        if self._failure is not None:
            raise Stopped

    def _count(self, stage: str, done: int, total: int) -> None:
        self.fetched = done
        self.on_bytes()

    @abstractmethod
    def rate(self) -> float:
        """Bytes per second that come, from a short try."""

    @abstractmethod
    def _fetch(self, file: PlannedFile, *, force: bool = False) -> Path:
        """Bring a file to the disk, with its bytes told to ``self._meter``; anew, with ``force``."""

    @abstractmethod
    def _delete(self, shard: str) -> None:
        """Remove a shard from the disk."""
