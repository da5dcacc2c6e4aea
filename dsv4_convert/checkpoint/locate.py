"""The one door to a published checkpoint, and the one to a folder behind a URL."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4_convert.checkpoint.folder import Checkpoint, open_checkpoint
from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.spec.names import layer_of, stage_of

if TYPE_CHECKING:
    from dsv4_convert.files.remote import RemoteFolder

_REPOSITORY = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*)(?:@(?P<revision>[A-Za-z0-9_./-]+))?"
)
_EXPECTED = "a folder, a repository of the Hub as ORG/NAME or ORG/NAME@REVISION, or gs://bucket/path"


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
    source: str | Path, *, revision: str | None = None, layers: Iterable[int] | None = None, discard: bool = False
) -> Checkpoint:
    """Open a published checkpoint, wherever it is.

    Only the headers of a remote one are read; its shards come when they are needed.

    Args:
        source: a folder; ``ORG/NAME`` or ``ORG/NAME@REVISION``, a repository of the Hub; or ``gs://bucket/path``.
        revision: of the repository, where ``source`` does not name it.
        layers: those whose shards are needed; None for all.
        discard: delete every shard of a repository after its use, unless it was on disk before. Copies of a
            bucket's shards are always deleted.

    Raises:
        UsageError: a revision of what has none, or the files of a local folder to be discarded.
        BadInput: none of the three, or not a checkpoint.
        ResourceError: the Hub or the bucket cannot be reached.
    """
    text = str(source)
    path = Path(source)
    local = "://" not in text and path.exists()
    match = None if local else _REPOSITORY.fullmatch(text)
    if revision is not None and (match is None or match["revision"] is not None):
        what = "is a local folder" if local else "is not a repository of the Hub"
        what = what if match is None else "names its revision already"
        raise UsageError(f"{text}: {what}, so --revision {revision} means nothing; leave it out")
    if local:
        if discard:
            raise UsageError(f"{text}: is a local folder, whose files are not deleted; leave --discard-source out")
        return open_checkpoint(path, partial=layers is not None)
    want = wanted_tensors(layers)
    if match is not None:
        from dsv4_convert.checkpoint.hub_stream import open_repository

        revision = revision or match["revision"]
        return open_repository(match["name"], revision=revision, want=want, discard=discard)
    if text.startswith("gs://"):
        from dsv4_convert.checkpoint.bucket import open_bucket

        return open_bucket(text, want=want)
    if "://" in text:
        raise UsageError(f"{text}: expected {_EXPECTED}")
    raise BadInput(
        f"{text}: no such folder, and not a repository such as deepseek-ai/DeepSeek-V4-Flash; expected {_EXPECTED}"
    )


def open_remote(url: str) -> RemoteFolder:
    """The folder behind a URL: ``https://``, ``hf://``, or what fsspec knows, such as ``gs://``.

    Raises:
        UsageError: a kind of URL that nobody knows, or whose package is not installed.
    """
    from dsv4_convert.files.remote import BucketFolder, HttpFolder

    if url.startswith(("https://", "http://")):
        return HttpFolder(url)
    if url.startswith("hf://"):
        from dsv4_convert.checkpoint.hub_folder import HubFolder

        return HubFolder.of_url(url)
    return BucketFolder(url)
