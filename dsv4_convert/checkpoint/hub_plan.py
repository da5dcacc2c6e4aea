"""The plan of a download from a Hub repository: which files of which commit, and what is on disk already."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from dsv4_convert.checkpoint.hub_errors import check_token, hub_errors
from dsv4_convert.checkpoint.hub_folder import HubFolder
from dsv4_convert.checkpoint.hub_progress import Meter
from dsv4_convert.checkpoint.hub_target import HubTarget, cached_commit, keep_commit
from dsv4_convert.checkpoint.index import CONFIG_NAME, INDEX_NAME, read_weight_map
from dsv4_convert.checkpoint.planned import PlannedFile, needed
from dsv4_convert.checkpoint.provenance import is_commit
from dsv4_convert.errors import BadInput, ResourceError, UsageError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DownloadPlan:
    """The plan of a download.

    Attributes:
        revision: the commit, 40 hex digits.
        folder: where the files are or will be.
        offline: made from the files on disk, because the Hub could not be asked.
        weight_map: shard of every tensor, from the index; None for a repository without one.
        target: the place of its files on this machine.
    """

    repo_id: str
    revision: str
    folder: Path
    files: tuple[PlannedFile, ...]
    offline: bool
    weight_map: Mapping[str, str] | None = None
    target: HubTarget | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def to_download_bytes(self) -> int:
        """Bytes of the files that are not on disk yet."""
        return sum(file.size for file in self.files if not file.cached)


def plan_download(
    repo_id: str,
    *,
    revision: str | None = None,
    want: Callable[[str], bool] | None = None,
    cache_dir: Path | str | None = None,
    local_dir: Path | str | None = None,
    force: bool = False,
) -> DownloadPlan:
    """Find out what a download would fetch. For that, only the index of the repository is fetched, to the cache.

    Args:
        repo_id: ``ORG/NAME``.
        revision: branch, tag or commit; the default branch if None.
        want: says of a tensor name whether the shard that holds it is needed; None for all shards.
        cache_dir: instead of HF_HUB_CACHE.
        local_dir: a plain folder for the files, instead of the cache.
        force: plan to fetch what is on disk again, and fetch the index again now.

    Raises:
        BadInput: repository, revision or files do not exist or may not be read, or the index is unusable.
        ResourceError: the Hub cannot be reached and the files are not on disk.
        UsageError: not a repository name, an unusable token, ``want`` wants nothing, or ``force`` while the Hub cannot
            be reached.
    """
    check_token()
    asked = revision or constants.DEFAULT_REVISION
    with hub_errors(repo_id, asked):
        validate_repo_id(repo_id)
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    local = Path(local_dir).expanduser() if local_dir is not None else None
    commit = _commit(repo_id, asked, cache)
    target = HubTarget(repo_id=repo_id, revision=commit, cache_dir=cache, local_dir=local)
    available, offline = _available(target)
    if offline and force:
        raise UsageError(f"{repo_id}: --force asks for a new download, but the Hub cannot be reached")
    what = f"{repo_id} at {asked} (commit {commit})"
    weight_map = None
    if INDEX_NAME in available:
        weight_map = read_weight_map(_index_file(target, available[INDEX_NAME], offline=offline, force=force))
    try:
        names = needed(available, weight_map, want)
    except BadInput as error:
        if not offline:
            raise BadInput(f"{what}: {error}") from None
        raise ResourceError(f"{what}: the Hub cannot be reached, and on disk it is incomplete: {error}") from None
    files = tuple(available[name] for name in names)
    return DownloadPlan(
        repo_id=repo_id,
        revision=commit,
        folder=target.folder,
        files=files if force else tuple(target.seen(file) for file in files),
        offline=offline,
        weight_map=weight_map,
        target=target,
    )


def _available(target: HubTarget) -> tuple[dict[str, PlannedFile], bool]:
    """Files by name, and whether they are the ones on disk because the Hub could not be asked."""
    try:
        return HubFolder(target.repo_id, target.revision).files(), False
    except ResourceError:
        present = {file.name: file for file in target.present()}
        if CONFIG_NAME not in present:
            raise
        _log.warning("%s: the Hub cannot be asked, going on with the files in %s", target.repo_id, target.folder)
        return present, True


def _commit(repo_id: str, revision: str, cache_dir: Path) -> str:
    """The commit of a revision; from the client's record of it where the Hub cannot be asked."""
    if is_commit(revision):
        return revision
    try:
        commit = HubFolder(repo_id, revision).commit()
    except ResourceError:
        if (known := cached_commit(cache_dir, repo_id, revision)) is None:
            raise
        return known
    keep_commit(cache_dir, repo_id, revision, commit)
    return commit


def _index_file(target: HubTarget, index: PlannedFile, *, offline: bool, force: bool) -> Path:
    """The index on disk. Fetched to the cache even for a ``local_dir``: planning leaves no trace there."""
    on_disk = target.local_dir is not None and target.oid(INDEX_NAME) is not None
    if offline or (on_disk and not force):
        return target.folder / INDEX_NAME
    return replace(target, local_dir=None).fetch(index, Meter("download", 0, None), force=force)
