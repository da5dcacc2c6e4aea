"""A checkpoint in a Hub repository, opened by its headers, whose shards arrive while it is read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from dsv4_convert.checkpoint.files import file_digest, stamp_of, stat_regular
from dsv4_convert.checkpoint.folder import Checkpoint, check_headers, open_checkpoint
from dsv4_convert.checkpoint.header import Header
from dsv4_convert.checkpoint.hub_errors import hub_errors
from dsv4_convert.checkpoint.hub_headers import measured_rate, read_headers
from dsv4_convert.checkpoint.hub_plan import DownloadPlan, PlannedFile, plan_download
from dsv4_convert.checkpoint.hub_progress import Meter, Stopped
from dsv4_convert.checkpoint.index import CONFIG_NAME, SHARD_SUFFIX
from dsv4_convert.checkpoint.strict_json import read_object
from dsv4_convert.errors import BadInput

#: Shards that are on disk, or on their way, and not given up yet, where each is given up after its use.
AHEAD = 3
_TRANSFERS = 4
_PROBE_BYTES = 8 << 20


@dataclass(frozen=True)
class _Source:
    """How the files of one plan are fetched."""

    plan: DownloadPlan
    cache_dir: Path | None
    local_dir: Path | None
    token: str | None

    def fetch(self, file: PlannedFile, *, bar_class: Any, force: bool = False) -> Path:
        """The file on disk, fetched if it is not there yet."""
        with hub_errors(self.plan.repo_id, self.plan.revision):
            fetched = HfApi(token=self.token, library_name="dsv4").hf_hub_download(
                self.plan.repo_id,
                file.name,
                revision=self.plan.revision,
                cache_dir=self.cache_dir,
                local_dir=self.local_dir,
                force_download=force,
                tqdm_class=bar_class,
            )
        return Path(fetched)


class HubCheckpoint(Checkpoint):
    """Made by :func:`open_repository`. Reading a tensor waits until its shard is on disk and has the Hub's hash.

    Shards come in the order given to :meth:`start`. A shard that is waited for comes next, whatever the order says, so
    that no order can lead to a standstill.

    Attributes:
        fetched: bytes that have arrived so far.
    """

    def __init__(
        self,
        plan: DownloadPlan,
        headers: Sequence[Header],
        *,
        config: Mapping[str, object],
        absent: frozenset[str],
        source: _Source,
        discard: bool,
    ) -> None:
        super().__init__(root=plan.folder, config=config, headers=headers, absent=absent, revision=plan.revision)
        self.repository = plan.repo_id
        self.plan = plan
        self.discard = discard
        self.fetched = 0
        self.on_bytes: Callable[[], None] = lambda: None
        self._files = {file.name: file for file in plan.files}
        self._source = source
        self._change = threading.Condition()
        self._order: list[str] = []
        self._urgent: list[str] = []
        self._begun: set[str] = set()
        self._here: set[str] = set()
        self._finished: set[str] = set()
        self._failure: BaseException | None = None
        self._meter = Meter("download", plan.to_download_bytes, self._count)
        self._threads: list[threading.Thread] = []

    @property
    def digests(self) -> Mapping[str, str]:
        """SHA-256 of the shards, by name, as the Hub states them."""
        return {name: file.oid for name, file in self._files.items() if file.oid is not None and len(file.oid) == 64}

    @property
    def shard_files(self) -> tuple[PlannedFile, ...]:
        """The shards of the plan."""
        return tuple(file for file in self.plan.files if file.name.endswith(SHARD_SUFFIX))

    @property
    def to_fetch(self) -> int:
        """Bytes that are still to come."""
        return self.plan.to_download_bytes

    @property
    def most_on_disk(self) -> int:
        """Bytes that its files will still take, at most, at a time."""
        sizes = sorted((file.size for file in self.plan.files if not file.cached), reverse=True)
        return sum(sizes[:AHEAD]) if self.discard else sum(sizes)

    def rate(self) -> float:
        """Bytes per second that the Hub sends, from a short try."""
        missing = [file for file in self.shard_files if not file.cached] or list(self.shard_files)
        return measured_rate(self.plan, missing[:_TRANSFERS], token=self._source.token, nbytes=_PROBE_BYTES)

    def fetch_small_files(self) -> None:
        """Fetch what belongs to the checkpoint beside the shards: config, index, tokenizer."""
        for file in self.plan.files:
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
                    for number in range(_TRANSFERS)
                ]
                for thread in self._threads:
                    thread.start()

    def finish(self, shard: str) -> None:
        """Nothing of this shard is needed any more: with ``discard`` it is deleted."""
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
                self._fetch_and_check(self._files[name])
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
            raise BadInput(f"{self.repository} at {self.revision}: {problem}, also when it was fetched again")
        self._stamps[self.root / file.name] = stamp_of(stat_regular(path))

    def _fetch(self, file: PlannedFile, *, force: bool = False) -> Path:
        return self._source.fetch(file, force=force, bar_class=self._meter.bar_class())

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

    def _delete(self, shard: str) -> None:
        """The file, what it links to in the cache, and the client's record of it."""
        path = self.root / shard
        linked = path.resolve() if path.is_symlink() else None
        path.unlink(missing_ok=True)
        if linked is not None and linked.is_relative_to(self.root.resolve().parents[1]):
            linked.unlink(missing_ok=True)
        (self.root / ".cache" / "huggingface" / "download" / f"{shard}.metadata").unlink(missing_ok=True)


def open_repository(
    repo_id: str,
    *,
    revision: str | None = None,
    want: Callable[[str], bool] | None = None,
    discard: bool = False,
    cache_dir: Path | None = None,
    local_dir: Path | None = None,
    token: str | None = None,
) -> Checkpoint:
    """Open a repository by its config, its index and the headers of its shards; no weight is fetched.

    Args:
        repo_id, revision, want, cache_dir, local_dir, token: as for :func:`dsv4_convert.checkpoint.hub.plan_download`.
        discard: delete each shard after its use, also one that was on disk before.

    Returns:
        A :class:`HubCheckpoint`; where the Hub cannot be reached and all files are on disk, their folder.

    Raises:
        BadInput, ResourceError, UsageError: as ``plan_download``.
        BadInput: damaged headers, or headers that contradict the index.
    """
    plan = plan_download(repo_id, revision=revision, want=want, cache_dir=cache_dir, local_dir=local_dir, token=token)
    if plan.offline:
        checkpoint = open_checkpoint(plan.folder, partial=want is not None)
        checkpoint.repository = repo_id
        return checkpoint
    shards = [file for file in plan.files if file.name.endswith(SHARD_SUFFIX)]
    headers = read_headers(plan, shards, token=token)
    source = _Source(plan, cache_dir, local_dir, token)
    (config,) = (file for file in plan.files if file.name == CONFIG_NAME)
    return HubCheckpoint(
        plan,
        headers,
        config=read_object(source.fetch(config, bar_class=Meter("download", 0, None).bar_class())),
        absent=_check_against_index(plan, headers),
        source=source,
        discard=discard,
    )


def _check_against_index(plan: DownloadPlan, headers: Sequence[Header]) -> frozenset[str]:
    """Index and headers state the same; returns the tensors of the shards that are not wanted."""
    if plan.weight_map is None:
        return frozenset()
    wanted: Collection[str] = {header.file.name for header in headers}
    check_headers(plan.folder, headers, {name: shard for name, shard in plan.weight_map.items() if shard in wanted})
    return frozenset(name for name, shard in plan.weight_map.items() if shard not in wanted)
