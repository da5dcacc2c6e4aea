"""Where a source is: a folder as it stands, or a Hub repository, downloaded first."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.names import drop_reason, layer_of

if TYPE_CHECKING:
    from dsv4_convert.checkpoint.hub_progress import Progress

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")


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
        return drop_reason(name) is None and (layer is None or layer in chosen)

    return want


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
        if revision is not None:
            raise UsageError(f"{source}: is a local folder, so --revision {revision} means nothing; leave it out")
        return Origin(path, None, None)
    if not _REPOSITORY.fullmatch(source):
        raise BadInput(f"{source}: no such folder, and not a repository such as deepseek-ai/DeepSeek-V4-Flash")
    from dsv4_convert.checkpoint.hub import download

    fetched = download(source, revision=revision, want=wanted_tensors(layers), progress=progress)
    return Origin(fetched.path, source, fetched.revision)
