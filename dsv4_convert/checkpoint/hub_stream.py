"""A checkpoint in a Hub repository, opened by its headers, whose shards arrive while it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from dsv4_convert.checkpoint.arriving import TRANSFERS, ArrivingCheckpoint
from dsv4_convert.checkpoint.folder import Checkpoint, absent_tensors, open_checkpoint
from dsv4_convert.checkpoint.header import Header
from dsv4_convert.checkpoint.hub_errors import hub_errors
from dsv4_convert.checkpoint.hub_headers import measured_rate, read_headers
from dsv4_convert.checkpoint.hub_plan import DownloadPlan, plan_download
from dsv4_convert.checkpoint.hub_progress import Meter
from dsv4_convert.checkpoint.index import CONFIG_NAME, SHARD_SUFFIX
from dsv4_convert.checkpoint.planned import PlannedFile
from dsv4_convert.checkpoint.strict_json import read_object

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


class HubCheckpoint(ArrivingCheckpoint):
    """A repository. Made by :func:`open_repository`."""

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
        super().__init__(
            root=plan.folder,
            config=config,
            headers=headers,
            absent=absent,
            revision=plan.revision,
            files=plan.files,
            discard=discard,
        )
        self.repository = plan.repo_id
        self.plan = plan
        self._source = source
        client = self.root.parents[1] if source.local_dir is None else self.root / ".cache" / "huggingface"
        #: One empty file for each shard that a run with ``discard`` has begun to fetch and not deleted yet.
        self._fetched_here = client / "dsv4-fetched"

    def rate(self) -> float:
        """Bytes per second that the Hub sends, from a short try."""
        missing = [file for file in self.shard_files if not file.cached] or list(self.shard_files)
        return measured_rate(self.plan, missing[:TRANSFERS], token=self._source.token, nbytes=_PROBE_BYTES)

    def _fetch(self, file: PlannedFile, *, force: bool = False) -> Path:
        if self.discard and not file.cached and file.name.endswith(SHARD_SUFFIX):
            self._fetched_here.mkdir(parents=True, exist_ok=True)
            (self._fetched_here / file.name).touch()
        return self._source.fetch(file, force=force, bar_class=self._meter.bar_class())

    def _delete(self, shard: str) -> None:
        """The file, what it links to in the cache, and the client's record of it; nothing that was there before."""
        mark = self._fetched_here / shard
        if not mark.exists():
            return
        path = self.root / shard
        linked = path.resolve() if path.is_symlink() else None
        path.unlink(missing_ok=True)
        if linked is not None and linked.is_relative_to(self.root.resolve().parents[1]):
            linked.unlink(missing_ok=True)
        (self.root / ".cache" / "huggingface" / "download" / f"{shard}.metadata").unlink(missing_ok=True)
        mark.unlink()
        with suppress(OSError):  # not empty, or another run has just put something there
            self._fetched_here.rmdir()


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
        discard: delete each shard after its use, unless it was on disk before. What an interrupted run with
            ``discard`` has fetched counts as fetched by this one.

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
        absent=absent_tensors(plan.folder, headers, plan.weight_map),
        source=source,
        discard=discard,
    )
