"""A checkpoint in a Hub repository, whose shards the Hub client brings to its cache or a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from dsv4_convert.checkpoint.folder import Checkpoint, open_checkpoint
from dsv4_convert.checkpoint.hub_folder import HubFolder
from dsv4_convert.checkpoint.hub_plan import plan_download
from dsv4_convert.checkpoint.hub_progress import Meter
from dsv4_convert.checkpoint.hub_target import HubTarget
from dsv4_convert.checkpoint.planned import PlannedFile
from dsv4_convert.checkpoint.streamed import StreamedCheckpoint
from dsv4_convert.files.remote import RemoteFolder


class HubOrigin:
    """An :class:`~dsv4_convert.checkpoint.streamed.Origin`: a repository at one commit."""

    def __init__(self, target: HubTarget, *, discard: bool) -> None:
        self.name, self.root = target.repo_id, target.folder
        self.revision: str | None = target.revision
        self.remote: RemoteFolder = HubFolder(target.repo_id, target.revision)
        self._target = target
        self._discard = discard
        client = self.root.parents[1] if target.local_dir is None else self.root / ".cache" / "huggingface"
        #: One empty file for each shard that a run with ``discard`` has begun to fetch and not deleted yet.
        self._fetched_here = client / "dsv4-fetched"

    def fetch(self, file: PlannedFile, meter: Meter, *, force: bool = False) -> Path:
        if self._discard and not file.cached and file.is_shard:
            self._fetched_here.mkdir(parents=True, exist_ok=True)
            (self._fetched_here / file.name).touch()
        return self._target.fetch(file, meter, force=force)

    def delete(self, shard: str) -> None:
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

    def changed(self) -> Mapping[str, str]:
        """Nothing changes at a commit."""
        return {}

    def close(self) -> None:
        """All files stay: others may use them."""


def open_repository(
    repo_id: str,
    *,
    revision: str | None = None,
    want: Callable[[str], bool] | None = None,
    discard: bool = False,
    cache_dir: Path | None = None,
    local_dir: Path | None = None,
) -> Checkpoint:
    """Open a repository by its config, its index and the headers of its shards; no weight is fetched.

    Args:
        repo_id, revision, want, cache_dir, local_dir: as for :func:`dsv4_convert.checkpoint.hub.plan_download`.
        discard: delete each shard after its use, unless it was on disk before. Shards that an interrupted
            run with ``discard`` has fetched count as fetched by this one.

    Returns:
        A streamed checkpoint; where the Hub cannot be reached and all files are on disk, their folder.

    Raises:
        BadInput, ResourceError, UsageError: as ``plan_download``.
        BadInput: damaged headers, or headers that contradict the index.
    """
    plan = plan_download(repo_id, revision=revision, want=want, cache_dir=cache_dir, local_dir=local_dir)
    if plan.offline:
        checkpoint = open_checkpoint(plan.folder, partial=want is not None)
        checkpoint.repository = repo_id
        return checkpoint
    assert plan.target is not None
    origin = HubOrigin(plan.target, discard=discard)
    return StreamedCheckpoint(origin, plan.files, weight_map=plan.weight_map, discard=discard)
