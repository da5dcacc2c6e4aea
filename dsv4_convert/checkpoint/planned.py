"""One file of a checkpoint that is somewhere else."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4_convert.checkpoint.index import CONFIG_NAME, INDEX_NAME

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
