"""The place of a Hub repository's files on this machine: the Hub client's cache, or a folder of the user's choice.

Shards are fetched by the client, which resumes, deduplicates and unpacks Xet storage. The client bounds neither what a
small file brings nor how long it takes, so :class:`.hub_folder.HubFolder` fetches these, and they lie where the client
finds them: ``<cache>/models--ORG--NAME/blobs/<oid>``, and a link to it at ``snapshots/<commit>/FILE``.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.file_download import repo_folder_name

from dsv4_convert.checkpoint.hub_errors import hub_errors
from dsv4_convert.checkpoint.hub_folder import HubFolder
from dsv4_convert.checkpoint.hub_progress import Meter
from dsv4_convert.checkpoint.index import is_shard_name
from dsv4_convert.checkpoint.planned import SMALL_FILES, PlannedFile
from dsv4_convert.checkpoint.provenance import cached_oid, is_commit, recorded
from dsv4_convert.errors import BadInput, ResourceError
from dsv4_convert.files.strict_json import MAX_JSON_BYTES
from dsv4_convert.files.writing import write_atomically, writing


@dataclass(frozen=True, kw_only=True)
class HubTarget:
    """A repository at one commit, and the place of its files on this machine."""

    repo_id: str
    revision: str
    cache_dir: Path
    local_dir: Path | None

    @property
    def folder(self) -> Path:
        """The folder of the files, whether they are there yet or not."""
        return self.local_dir or self._snapshot

    @property
    def _storage(self) -> Path:
        return self.cache_dir / repo_folder_name(repo_id=self.repo_id, repo_type="model")

    @property
    def _snapshot(self) -> Path:
        return self._storage / "snapshots" / self.revision

    def oid(self, name: str) -> str | None:
        """The client's record of a file on disk; None if it is not there, or of another revision."""
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

    def fetch(self, file: PlannedFile, meter: Meter, *, force: bool = False) -> Path:
        """The file on disk, fetched if it is not there yet, or with ``force``.

        Raises:
            BadInput, ResourceError: the Hub does not give it, or it cannot be written.
        """
        if not file.is_shard and not (self.seen(file).cached and self.local_dir is not None and not force):
            self._fetch_small(file, meter, force=force)
            if self.local_dir is None:
                return self.folder / file.name
            if force:
                (self.local_dir / file.name).unlink(missing_ok=True)
        with hub_errors(self.repo_id, self.revision, self.folder):
            return Path(
                HfApi(library_name="dsv4").hf_hub_download(
                    self.repo_id,
                    file.name,
                    revision=self.revision,
                    cache_dir=self.cache_dir,
                    local_dir=self.local_dir,
                    force_download=force and file.is_shard,
                    tqdm_class=meter.bar_class(file.size),
                )
            )

    def _fetch_small(self, file: PlannedFile, meter: Meter, *, force: bool) -> None:
        """Into the cache, whole and of the size that is stated."""
        path, blob = self._snapshot / file.name, self._storage / "blobs" / str(file.oid)
        if path.is_file() and not force:
            return
        if force or not blob.is_file():
            what = f"{self.repo_id} at {self.revision}: {file.name}"
            if file.size > MAX_JSON_BYTES:
                raise BadInput(f"{what}: {file.size:,} bytes are stated, where at most {MAX_JSON_BYTES:,} are expected")
            content = HubFolder(self.repo_id, self.revision).content(file.name, limit=file.size)
            if content is None or len(content) != file.size:
                found = "no such file" if content is None else f"{len(content):,} bytes"
                raise ResourceError(f"{what}: expected {file.size:,} bytes, found {found}; run the same command again")
            with writing(blob):
                blob.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(blob, content)
            meter.add(len(content))
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            try:
                path.symlink_to(os.path.relpath(blob, path.parent))
            except FileExistsError:  # another process has just made it
                pass
            except OSError:  # a file system without links
                shutil.copyfile(blob, path)


def cached_commit(cache_dir: Path, repo_id: str, revision: str) -> str | None:
    """The commit that a revision had when it was last asked for; None if that is not known."""
    with suppress(OSError, ValueError):
        commit = _reference(cache_dir, repo_id, revision).read_text(encoding="ascii").strip()
        return commit if is_commit(commit) else None
    return None


def keep_commit(cache_dir: Path, repo_id: str, revision: str, commit: str) -> None:
    """Record the commit of a revision as the client does, where the cache can be written."""
    with suppress(OSError, ResourceError, ValueError):
        reference = _reference(cache_dir, repo_id, revision)
        reference.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(reference, commit.encode())


def _reference(cache_dir: Path, repo_id: str, revision: str) -> Path:
    """The client's record of a revision. Raises :class:`ValueError` for one that leads elsewhere."""
    if ".." in revision.split("/") or revision.startswith("/"):
        raise ValueError(revision)
    return cache_dir / repo_folder_name(repo_id=repo_id, repo_type="model") / "refs" / revision
