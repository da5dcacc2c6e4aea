"""Verification of a converted checkpoint: its bytes against its manifest, and against its source."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from dsv4_convert.convert.against import compare_with_source
from dsv4_convert.store import open_store, unaccounted
from dsv4_convert.store import verify as verify_store
from dsv4_convert.store.tables import repeated_experts

#: Called with (bytes checked, bytes in total, path of the leaf): for the manifest, then once more for the source.
Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """``problems``: what differs, one line each; none if every byte is right. ``unaccounted``: what the manifest does
    not name. ``repeated_experts``: tables that name an expert twice; not looked for where there are problems.
    ``leaves`` and ``nbytes``: how much was checked."""

    problems: tuple[str, ...]
    unaccounted: tuple[str, ...]
    repeated_experts: tuple[str, ...]
    leaves: int
    nbytes: int

    @property
    def passed(self) -> bool:
        """Every byte is right."""
        return not self.problems


def verify(
    checkpoint: str | os.PathLike[str],
    against: Path | str | None = None,
    *,
    progress: Progress = lambda done, total, path: None,
) -> Verification:
    """Hash every stored byte of a converted checkpoint again and compare with its manifest.

    Args:
        checkpoint: a folder, or a URL of a bucket.
        against: the source of the conversion, to decode again and compare bit by bit:
            what :func:`~dsv4_convert.checkpoint.locate.open_source` opens.
        progress: called after every chunk.

    Raises:
        BadInput: there is no converted checkpoint, or the source is none of this model.
        ResourceError: the Hub or the bucket cannot be reached.

    Examples:
        >>> verify("orbax", "checkpoint").passed
        True
    """
    store = open_store(checkpoint)
    problems = verify_store(store, progress)
    if against is not None:
        problems += compare_with_source(store, against, progress)
    return Verification(
        problems=tuple(problems),
        unaccounted=tuple(unaccounted(store)),
        repeated_experts=() if problems else tuple(repeated_experts(store)),
        leaves=len(store.paths),
        nbytes=sum(store.leaf(path).nbytes for path in store.paths),
    )
