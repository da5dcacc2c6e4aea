"""A published checkpoint that is somewhere else, opened by its headers, whose shards arrive while it is read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from dsv4_convert.checkpoint.folder import Checkpoint, absent_tensors
from dsv4_convert.checkpoint.header import Header, read_header, read_header_by_ranges
from dsv4_convert.checkpoint.hub_progress import Meter, Stopped
from dsv4_convert.checkpoint.index import CONFIG_NAME
from dsv4_convert.checkpoint.planned import PlannedFile, check_room
from dsv4_convert.errors import BadInput, ResourceError
from dsv4_convert.files.reading import set_aside, stamp_of, stat_regular
from dsv4_convert.files.remote import RemoteFolder
from dsv4_convert.files.strict_json import read_object

#: Shards that are on disk, or on their way, and not given up yet, where each is given up after its use.
AHEAD = 3
TRANSFERS = 4
_PROBE_BYTES = 8 << 20


class Origin(Protocol):
    """Where the files of a checkpoint come from, and where they go on this machine."""

    #: The name of the checkpoint: a repository, or a URL without secrets.
    name: str
    #: The commit; None where there is none.
    revision: str | None
    #: Where the files come to lie.
    root: Path
    #: The files by ranges.
    remote: RemoteFolder

    def fetch(self, file: PlannedFile, meter: Meter, *, force: bool = False) -> Path:
        """Bring a file to the disk, with its bytes told to ``meter``; anew, with ``force``."""

    def delete(self, shard: str) -> None:
        """Remove a shard from the disk, if it was fetched for this checkpoint."""

    def changed(self) -> Mapping[str, str]:
        """A text for each shard that changes when it does."""

    def close(self) -> None:
        """Remove what is of no use to anybody else."""


class StreamedCheckpoint(Checkpoint):
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
        origin: Origin,
        files: Sequence[PlannedFile],
        *,
        weight_map: Mapping[str, str] | None,
        discard: bool,
    ) -> None:
        """Read config and headers; no weight is fetched.

        Args:
            origin: where the files come from. It is closed with the checkpoint.
            files: what belongs to the checkpoint, or to the wanted part of it.
            weight_map: the shard of every tensor, from the index; None without one.
            discard: delete each shard after its use.

        Raises:
            BadInput: headers that are damaged or contradict the index.
            ResourceError: they cannot be read.
        """
        meter = Meter("download", 0, None)
        (config,) = (file for file in files if file.name == CONFIG_NAME)
        with ThreadPoolExecutor(2 * TRANSFERS) as pool:
            headers = list(pool.map(lambda shard: _header(origin, shard), (file for file in files if file.is_shard)))
        super().__init__(
            root=origin.root,
            config=read_object(_fetched(origin, config, meter)),
            headers=headers,
            absent=absent_tensors(origin.root, headers, weight_map),
            revision=origin.revision,
        )
        self.repository = origin.name
        self.files = tuple(files)
        self.discard = discard
        self.fetched = 0
        self.on_bytes: Callable[[], None] = lambda: None
        self._origin = origin
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
        return {file.name: file.sha256 for file in self.files if file.is_shard and file.sha256 is not None}

    def changed(self) -> Mapping[str, str]:
        """As :meth:`Checkpoint.changed`."""
        return self._origin.changed()

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
            if not file.is_shard:
                _fetched(self._origin, file, self._meter)

    def prefetch(self) -> None:
        """As :meth:`Checkpoint.prefetch`. Shards of a bucket that are not read yet come one by one."""
        check_room(self.root, self.to_fetch)
        self.fetch_small_files()
        self.start([file.name for file in self.files if file.is_shard])

    def rate(self) -> float:
        """Bytes per second that come, from a short try. Raises :class:`ResourceError`: nothing came."""
        shards = [file for file in self.files if file.is_shard]
        tried = [file for file in shards if not file.cached][:TRANSFERS] or shards[:TRANSFERS]
        start = time.perf_counter()
        with ThreadPoolExecutor(len(tried)) as pool:
            parts = pool.map(lambda file: _part(self._origin, file, 0, min(file.size, _PROBE_BYTES)), tried)
            count = sum(map(len, parts))
        if not count:
            raise ResourceError(f"{self.repository}: nothing came; try again later")
        return count / max(time.perf_counter() - start, 1e-6)

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
            self._origin.delete(shard)

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
        self._origin.close()

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
                path = _fetched(self._origin, self._by_name[name], self._meter, self._check_going_on)
                self._stamps[self.root / name] = stamp_of(stat_regular(path))
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

    def _check_going_on(self) -> None:
        if self._failure is not None:
            raise Stopped

    def _count(self, stage: str, done: int, total: int) -> None:
        self.fetched = done
        self.on_bytes()


def _header(origin: Origin, shard: PlannedFile) -> Header:
    """The header of a shard: from the disk where it is there already."""
    file = origin.root / shard.name
    if shard.cached and file.is_file():
        return read_header(file)
    return read_header_by_ranges(file, shard.size, lambda start, stop: _part(origin, shard, start, stop))


def _part(origin: Origin, shard: PlannedFile, start: int, stop: int) -> bytes:
    try:
        return origin.remote.read(shard.name, start, stop)
    except FileNotFoundError:
        raise BadInput(f"{origin.name}: {shard.name} is listed there, and missing; try again later") from None


def _fetched(
    origin: Origin, file: PlannedFile, meter: Meter, check_going_on: Callable[[], None] = lambda: None
) -> Path:
    """A file on the disk, fetched again from the beginning if what is there is not what is stated."""
    path = origin.fetch(file, meter)
    problem = file.problem(path, lambda _: check_going_on())
    if problem is not None:
        path = origin.fetch(file, meter, force=True)
        problem = file.problem(path, lambda _: check_going_on())
    if problem is not None:
        set_aside(path)
        raise BadInput(f"{origin.name}: {problem}, also when it was fetched again")
    return path
