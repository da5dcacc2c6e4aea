"""Writing leaves whose chunks a function gives, in several threads: what most tests of the store begin with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_convert.store import CheckpointWriter, Chunk, LeafSpec, WriteSummary
from dsv4_convert.store.threads import in_threads


@dataclass(frozen=True, kw_only=True)
class FilledLeaf(LeafSpec):
    """A leaf, and what gives its chunks. Called from several threads at once."""

    chunks: Callable[[tuple[int, ...]], np.ndarray[Any, Any]]


def write_leaves(
    destination: str | Path,
    leaves: Sequence[FilledLeaf],
    *,
    workers: int = 4,
    metadata: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    **options: Any,
) -> WriteSummary:
    """Write all leaves, each process its share; ``options`` are those of the writer."""
    with CheckpointWriter(destination, leaves, **{"fingerprint": {}, **options}) as writer:
        write_pending(writer, workers=workers)
        return writer.commit(metadata or {}, files or {})


def write_pending(writer: CheckpointWriter, *, workers: int = 4) -> None:
    """Write the share of this process of what is pending."""

    def work(chunk: Chunk) -> None:
        assert isinstance(chunk.leaf, FilledLeaf)
        writer.write(chunk, chunk.leaf.chunks(chunk.index))

    mine = writer.processes.share(writer.pending(), lambda chunk: chunk.nbytes)
    with in_threads(work, mine, workers=workers) as done:
        for _ in done:
            pass
