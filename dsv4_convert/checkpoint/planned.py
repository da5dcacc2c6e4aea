"""The files of a checkpoint that is somewhere else: which of them are needed, and whether what came is right."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from dsv4_convert.checkpoint.index import CONFIG_NAME, INDEX_NAME, SHARD_SUFFIX, is_shard_name
from dsv4_convert.errors import BadInput, ResourceError, UsageError, listed
from dsv4_convert.files.limits import free_bytes
from dsv4_convert.files.reading import file_digest, stat_regular

#: Fetched where they are there; everything else beside the weights (code, pictures) stays there.
SMALL_FILES = (
    CONFIG_NAME,
    INDEX_NAME,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """One file of a download.

    Attributes:
        size: bytes.
        oid: what the content has to hash to: the sha256 of an LFS file (64 hex digits) or the git blob hash (40);
            None where the Hub was not reachable and the cache does not say.
        cached: already on disk, so that nothing is transferred.
    """

    name: str
    size: int
    oid: str | None
    cached: bool

    @property
    def is_shard(self) -> bool:
        """Whether it holds tensors."""
        return self.name.endswith(SHARD_SUFFIX)

    @property
    def sha256(self) -> str | None:
        """SHA-256 of the content, where somebody states it."""
        return self.oid if self.oid is not None and len(self.oid) == 64 else None

    def problem(self, path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> str | None:
        """How the file at ``path`` differs from this one; None if it does not, as far as a hash is stated.

        ``on_bytes`` is told how many bytes were hashed. Raises :class:`BadInput` if the file cannot be read.
        """
        size = stat_regular(path).st_size
        if size != self.size:
            return f"{path}: expected {self.size:,} bytes, found {size:,}"
        if self.oid is None:
            return None
        algorithm, prefix = ("sha256", b"") if self.sha256 is not None else ("sha1", b"blob %d\0" % size)
        found = file_digest(path, algorithm, prefix=prefix, on_bytes=on_bytes)
        return None if found == self.oid else f"{path}: expected {algorithm} {self.oid}, found {found}"


def check_room(folder: Path, nbytes: int) -> None:
    """Raise :class:`ResourceError` unless ``nbytes`` more fit where ``folder`` lies."""
    free = free_bytes(folder)
    if nbytes > free:
        raise ResourceError(
            f"{folder}: {nbytes:,} bytes are still to be downloaded, {free:,} are free; make room, choose another "
            "folder or HF_HUB_CACHE (for a bucket TMPDIR), or take only some layers"
        )


def needed(
    available: Collection[str], weight_map: Mapping[str, str] | None, want: Callable[[str], bool] | None
) -> list[str]:
    """Names of the files to fetch: the small ones, and the shards that hold a wanted tensor (None: all tensors).

    Raises:
        BadInput: config, index or shards are missing.
        UsageError: no tensor is wanted.
    """
    if CONFIG_NAME not in available:
        raise BadInput(
            f"no {CONFIG_NAME}, so not a model that can be converted; check the repository's name or the path"
        )
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
                "give the repository, revision or folder that holds the weights"
            )
    return [*(name for name in SMALL_FILES if name in available), *shards]
