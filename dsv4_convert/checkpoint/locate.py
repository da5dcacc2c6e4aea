"""Where a source is: a folder as it stands, or a Hub repository."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4_convert.checkpoint.folder import Checkpoint, open_checkpoint
from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.folders import is_repository
from dsv4_convert.spec.names import layer_of, stage_of

if TYPE_CHECKING:
    from dsv4_convert.checkpoint.hub_progress import Progress


@dataclass(frozen=True)
class Origin:
    """A checkpoint on disk, and the repository and commit that it came from where that is known."""

    path: Path
    repository: str | None
    revision: str | None


def wanted_tensors(layers: Iterable[int] | None) -> Callable[[str], bool] | None:
    """Which tensors the chosen layers need: their own and those of the model level. None, for all, if ``layers`` is."""
    if layers is None:
        return None
    chosen = frozenset(layers)

    def want(name: str) -> bool:
        layer = layer_of(name)
        return stage_of(name) is None and (layer is None or layer in chosen)

    return want


def open_source(
    source: str, *, revision: str | None = None, layers: Iterable[int] | None = None, discard: bool = False
) -> Checkpoint:
    """Open a folder, or a repository by its headers alone; shards of a repository come when they are read.

    Args:
        source: folder, ``owner/name``, or ``gs://bucket/path``.
        revision: of the repository.
        layers: those whose shards are needed; None for all.
        discard: delete every shard of a repository after its use, unless it was on disk before. Copies of a
            bucket's shards are always deleted.

    Raises:
        UsageError: a revision of a local folder, or its files to be discarded.
        BadInput: neither a folder nor a repository, or not a checkpoint.
        ResourceError: the Hub cannot be reached.
    """
    if "://" in source:
        if revision is not None or not source.startswith("gs://"):
            raise UsageError(
                f"{source}: expected gs://bucket/path, a folder or a repository; --revision is for the last"
            )
        from dsv4_convert.checkpoint.bucket import open_bucket

        return open_bucket(source, want=wanted_tensors(layers))
    path = Path(source)
    if path.exists():
        if discard:
            raise UsageError(f"{source}: is a local folder, whose files are not deleted; leave --discard-source out")
        _check_folder_revision(source, revision)
        return open_checkpoint(path, partial=layers is not None)
    _check_repository(source)
    from dsv4_convert.checkpoint.hub_stream import open_repository

    return open_repository(source, revision=revision, want=wanted_tensors(layers), discard=discard)


def locate(
    source: str,
    *,
    revision: str | None = None,
    layers: Iterable[int] | None = None,
    progress: Progress | None = None,
) -> Origin:
    """The folder of ``source``; a repository (``owner/name``) is downloaded, of its shards only those that are needed.

    Raises:
        UsageError: a revision of a local folder.
        BadInput: neither a folder nor a repository; the download fails.
    """
    path = Path(source)
    if path.exists():
        _check_folder_revision(source, revision)
        return Origin(path, None, None)
    _check_repository(source)
    from dsv4_convert.checkpoint.hub import download

    fetched = download(source, revision=revision, want=wanted_tensors(layers), progress=progress)
    return Origin(fetched.path, source, fetched.revision)


def _check_folder_revision(source: str, revision: str | None) -> None:
    if revision is not None:
        raise UsageError(f"{source}: is a local folder, so --revision {revision} means nothing; leave it out")


def _check_repository(source: str) -> None:
    if not is_repository(source):
        raise BadInput(f"{source}: no such folder, and not a repository such as deepseek-ai/DeepSeek-V4-Flash")
