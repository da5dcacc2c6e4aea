"""What a download from a Hub repository would fetch: which files of which commit, and what is on disk already."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

from dsv4_convert.checkpoint.hub_errors import check_token, hub_errors
from dsv4_convert.checkpoint.hub_progress import Meter
from dsv4_convert.checkpoint.index import CONFIG_NAME, INDEX_NAME, SHARD_SUFFIX, is_shard_name, read_weight_map
from dsv4_convert.checkpoint.planned import SMALL_FILES, PlannedFile
from dsv4_convert.checkpoint.provenance import cached_oid, is_commit, is_oid, recorded
from dsv4_convert.errors import BadInput, ResourceError, UsageError, listed

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DownloadPlan:
    """What a download would fetch.

    Attributes:
        revision: the commit, 40 hex digits.
        folder: where the files are or will be.
        offline: made from the files on disk, because the Hub could not be asked.
        weight_map: shard of every tensor, from the index; None for a repository without one.
    """

    repo_id: str
    revision: str
    folder: Path
    files: tuple[PlannedFile, ...]
    offline: bool
    weight_map: Mapping[str, str] | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def to_download_bytes(self) -> int:
        """Bytes of the files that are not on disk yet."""
        return sum(file.size for file in self.files if not file.cached)


@dataclass(frozen=True, kw_only=True)
class _Target:
    """Where a repository at one commit goes: a snapshot in the Hub cache, or a folder of the user's choice."""

    repo_id: str
    revision: str
    cache_dir: Path
    local_dir: Path | None

    @property
    def _storage(self) -> Path:
        return self.cache_dir / repo_folder_name(repo_id=self.repo_id, repo_type="model")

    @property
    def folder(self) -> Path:
        return self.local_dir or self._storage / "snapshots" / self.revision

    def oid(self, name: str) -> str | None:
        """What the client recorded about a file on disk; None if it is not there, or of another revision."""
        if self.local_dir is None:
            return cached_oid(self.folder / name)
        record = recorded(self.local_dir, name)
        return record.oid if record is not None and record.commit == self.revision else None

    def seen(self, file: PlannedFile) -> PlannedFile:
        """The file, as ``cached`` if the client would take it from disk."""
        path = self.folder / file.name
        if self.local_dir is None:
            cached = path.is_file() or (file.oid is not None and (self._storage / "blobs" / file.oid).is_file())
        else:
            record = recorded(self.local_dir, file.name)
            cached = record is not None and record.oid == file.oid and path.stat().st_size == file.size
        return replace(file, cached=cached)

    def present(self) -> list[PlannedFile]:
        """The checkpoint's files that are on disk at this commit."""
        files = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        return [
            PlannedFile(name=file.name, size=file.stat().st_size, oid=self.oid(file.name), cached=True)
            for file in files
            if file.name in SMALL_FILES or is_shard_name(file.name)
            if file.is_file() and (self.local_dir is None or self.oid(file.name) is not None)
        ]


def plan_download(
    repo_id: str,
    *,
    revision: str | None = None,
    want: Callable[[str], bool] | None = None,
    cache_dir: Path | str | None = None,
    local_dir: Path | str | None = None,
    force: bool = False,
) -> DownloadPlan:
    """Find out what a download would fetch. Of the repository only the index is fetched for that, to the cache.

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
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    api = HfApi(library_name="dsv4")
    with hub_errors(repo_id, asked):
        commit = api.resolve_revision(repo_id, revision=revision, cache_dir=cache).resolved
    if not is_commit(commit):
        raise BadInput(f"{repo_id} at {asked}: expected the hash of a commit from the Hub, found {commit[:80]!r}")
    local = Path(local_dir).expanduser() if local_dir is not None else None
    target = _Target(repo_id=repo_id, revision=commit, cache_dir=cache, local_dir=local)

    with hub_errors(repo_id, asked):
        available, offline = _available(api, target)
    if offline and force:
        raise UsageError(f"{repo_id}: --force asks for a new download, but the Hub cannot be reached")
    what = f"{repo_id} at {asked} (commit {commit})"
    weight_map = None
    if INDEX_NAME in available:
        weight_map = read_weight_map(_index_file(api, target, offline=offline, force=force))
    try:
        names = _needed(available, weight_map, want)
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
    )


def _available(api: HfApi, target: _Target) -> tuple[dict[str, PlannedFile], bool]:
    """Files by name, and whether they are the ones on disk because the Hub could not be asked."""
    try:
        return {file.name: file for file in _listed(api, target)}, False
    except (OfflineModeIsEnabled, httpx.TransportError, HfHubHTTPError) as error:
        answered = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        present = {file.name: file for file in target.present()}
        if answered or CONFIG_NAME not in present:
            raise
        _log.warning("%s: the Hub cannot be asked, going on with the files in %s", target.repo_id, target.folder)
        return present, True


def _listed(api: HfApi, target: _Target) -> Iterable[PlannedFile]:
    """The files at the top of the repository, from the Hub."""
    for entry in api.list_repo_tree(target.repo_id, revision=target.revision):
        if not isinstance(entry, RepoFile):
            continue
        oid = entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
        if not is_oid(oid):
            raise BadInput(f"{target.repo_id}: the Hub states {oid[:80]!r} as hash of {entry.path!r}")
        yield PlannedFile(name=entry.path, size=entry.size, oid=oid, cached=False)


def _needed(
    available: Collection[str], weight_map: Mapping[str, str] | None, want: Callable[[str], bool] | None
) -> list[str]:
    """Names of the files to fetch: the small ones, and the shards that hold a wanted tensor."""
    if CONFIG_NAME not in available:
        raise BadInput(f"no {CONFIG_NAME}, so not a model that can be converted; check the repository's name")
    if weight_map is not None:
        shards = sorted({shard for name, shard in weight_map.items() if want is None or want(name)})
        if not shards:
            raise UsageError(f"none of the {len(weight_map)} tensors is wanted; check the layers asked for")
        if missing := [shard for shard in shards if shard not in available]:
            raise BadInput(f"{len(missing)} of {len(shards)} shards are missing:\n{listed(missing)}")
    else:
        shards = [name for name in available if name.endswith(SHARD_SUFFIX)]
        if len(shards) != 1 or not is_shard_name(shards[0]):
            raise BadInput(
                f"expected {INDEX_NAME} or one {SHARD_SUFFIX} file, found {len(shards)} such files and no index; "
                "give the repository or revision that holds the weights"
            )
    return [*(name for name in SMALL_FILES if name in available), *shards]


def _index_file(api: HfApi, target: _Target, *, offline: bool, force: bool) -> Path:
    """The index on disk. Fetched to the cache even for a ``local_dir``: planning leaves no trace there."""
    on_disk = target.local_dir is not None and target.oid(INDEX_NAME) is not None
    if offline or (on_disk and not force):
        return target.folder / INDEX_NAME
    with hub_errors(target.repo_id, target.revision):
        return Path(
            api.hf_hub_download(
                target.repo_id,
                INDEX_NAME,
                revision=target.revision,
                cache_dir=target.cache_dir,
                force_download=force,
                tqdm_class=Meter("download", 0, None).bar_class(),
            )
        )
