"""``dsv4 convert hf-to-orbax``: a checkpoint becomes an Orbax checkpoint, chunk by chunk."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dsv4_convert.checkpoint import Checkpoint, open_checkpoint
from dsv4_convert.convert.account import Account, account, accounts_of, assemble, rounding_summary, to_account
from dsv4_convert.convert.chunks import ChunkMaker
from dsv4_convert.convert.layouts import Layout
from dsv4_convert.convert.plan import MAX_MEMORY, Plan, plan
from dsv4_convert.convert.shards import ShardUse, as_arriving
from dsv4_convert.convert.sources import SOURCES_FILE, Shard
from dsv4_convert.convert.storage import Piece, Storage
from dsv4_convert.errors import printable
from dsv4_convert.names import TABLE_VERSION
from dsv4_convert.store import Compression, LeafSpec, Note, Processes, WriteSummary, write_checkpoint
from dsv4_convert.store.arrays import Array
from dsv4_convert.store.layout import Index
from dsv4_convert.store.orbax_processes import current_processes

#: Small files of the source that go along; they are copied as they are where they exist.
COMPANIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@dataclasses.dataclass(frozen=True)
class Advance:
    """How far a conversion is: bytes read and written, of how many, and the leaf that was worked on last.

    ``fetched`` is the bytes that came over the network; None for a source on disk.
    """

    read: int
    to_read: int
    written: int
    to_write: int
    path: str
    fetched: int | None = None


def hf_to_orbax(
    source: Path,
    destination: str | os.PathLike[str],
    *,
    storage: Storage = Storage.BFLOAT16,
    layers: Iterable[int] | None = None,
    layout: Layout = Layout.DSV4,
    compression: Compression = "none",
    max_memory: int = MAX_MEMORY,
    workers: int | None = None,
    name: str | None = None,
    revision: str | None = None,
    restart: bool = False,
    overwrite: bool = False,
    progress: Callable[[Advance], None] = lambda _: None,
) -> tuple[Plan, WriteSummary]:
    """Convert a local checkpoint folder: :func:`plan` and :func:`carry_out`.

    Args:
        source: folder with ``config.json`` and safetensors shards, in any dialect of :mod:`dsv4_convert.names`.
        destination: folder to create, or URL of a bucket.
        storage: how weights are stored.
        layers: convert these layers and the model level only; None for all.
        layout: whose parameter tree is written.
        compression: see :func:`dsv4_convert.store.write_checkpoint`.
        max_memory: bytes beyond the interpreter with its imports.
        workers: threads, at most; None for what cores and memory allow.
        name, revision, restart, overwrite, progress: see :func:`carry_out`.

    Raises:
        BadInput: the source is corrupt, incomplete or not a DeepSeek-V4 text model.
        UsageError: the destination exists, or a layer does not.
        ResourceError: the disk is full, or the memory allowed is too small.

    Examples:
        >>> plan, summary = hf_to_orbax(Path("checkpoint"), "converted")
    """
    with open_checkpoint(source, partial=layers is not None) as checkpoint:
        config = checkpoint.architecture()
        planned = plan(checkpoint, config, storage, layers=layers, layout=layout, compression=compression)
        summary = carry_out(
            planned,
            checkpoint,
            destination,
            name=name,
            revision=revision,
            workers=planned.workers(max_memory, workers),
            restart=restart,
            overwrite=overwrite,
            progress=progress,
        )
    return planned, summary


def carry_out(
    planned: Plan,
    checkpoint: Checkpoint,
    destination: str | os.PathLike[str],
    *,
    name: str | None = None,
    revision: str | None = None,
    workers: int = 4,
    processes: Processes | None = None,
    restart: bool = False,
    overwrite: bool = False,
    progress: Callable[[Advance], None] = lambda _: None,
) -> WriteSummary:
    """Carry out a plan; memory holds one chunk per worker, never a layer.

    Args:
        planned: what is to be done.
        checkpoint: the source that the plan was made of, open.
        destination: folder to create, or URL of a bucket such as ``gs://bucket/model``; an interrupted run leaves it
            absent and is continued by the same call.
        name: what the manifest calls the source, such as its repository; the folder's name if None.
        revision: the source's commit; what the folder itself says if None.
        workers: threads; see :meth:`Plan.workers`.
        processes: those that share the work; those of ``jax.distributed`` if None, where it is initialised.
        restart: discard an interrupted run instead of going on with it.
        overwrite: replace a finished conversion at ``destination``.
        progress: called at the start, with what an interrupted run has done, and after every chunk.

    Raises:
        BadInput: the source is corrupt or changed.
        UsageError: the destination exists, or an interrupted run had another source or other settings.
        ResourceError: the disk is full, or another process writes the same destination.
    """
    arriving = as_arriving(checkpoint)
    if arriving is not None:
        arriving.fetch_small_files()
    maker = ChunkMaker(checkpoint, experts=planned.config.n_routed_experts)
    weights = sorted(to_account(planned))
    sharing = processes or current_processes()
    shards = ShardUse(planned, weights, checkpoint, ahead=sharing.count == 1)
    described = {name: Shard(size=size, sha256=checkpoint.digests.get(name)) for name, size in checkpoint.sizes.items()}
    origin = {
        "name": name or checkpoint.repository or printable(checkpoint.root.resolve().name),
        "revision": revision or checkpoint.revision,
        "shards": {name: shard.size for name, shard in described.items()},
    }
    companions = _companions(checkpoint)

    now = Advance(0, planned.bytes_read, 0, planned.bytes_written, "", None if arriving is None else 0)

    def advance(written: int, total: int, path: str) -> None:
        nonlocal now
        now = dataclasses.replace(now, read=shards.read, written=written, to_write=total, path=path or now.path)
        progress(now)

    def more_fetched() -> None:
        nonlocal now
        if arriving is not None:
            now = dataclasses.replace(now, fetched=arriving.fetched)
            progress(now)

    if arriving is not None:
        arriving.on_bytes = more_fetched

    def spec(piece: Piece) -> LeafSpec:
        def chunk(index: Index) -> Array:
            shards.begin()
            return maker.chunk(piece, index)

        return LeafSpec(
            path=piece.path,
            shape=piece.shape,
            dtype=piece.dtype,
            chunk_shape=piece.chunk_shape,
            chunks=chunk,
            rank=lambda index: shards.rank(piece, index),
            sources=piece.sources,
            rule=piece.rule_name,
        )

    def note(weight: str) -> Note:
        source, rule = planned.sources[weight]

        def value() -> dict[str, Any]:
            shards.begin()
            return account(checkpoint, source, rule, planned.storage).to_json()

        return Note(name=weight, value=value, rank=shards.rank_of_note(weight))

    def files(summary: WriteSummary) -> dict[str, bytes]:
        sources = assemble(planned, accounts_of(summary.notes), summary.records, described)
        return {**companions, SOURCES_FILE: sources.to_bytes()}

    return write_checkpoint(
        destination,
        [spec(piece) for piece in planned.pieces],
        notes=[note(weight) for weight in weights],
        fingerprint={
            "source": origin,
            # A commit says more than times do, where it is known.
            "changed": None if checkpoint.revision is not None else dict(checkpoint.changed()),
            "config": hashlib.sha256(companions["config.json"]).hexdigest(),
            "storage": planned.storage.value,
            "layout": planned.layout.value,
            "names_table": TABLE_VERSION,
        },
        metadata=lambda summary: _metadata(planned, origin, accounts_of(summary.notes)),
        extra_files=files,
        compression=planned.compression,
        workers=workers,
        processes=sharing,
        progress=advance,
        committed=shards.committed,
        stopping=arriving.stop if arriving is not None else lambda: None,
        restart=restart,
        overwrite=overwrite,
    )


def _companions(checkpoint: Checkpoint) -> dict[str, bytes]:
    files = (checkpoint.root / name for name in COMPANIONS)
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def _metadata(planned: Plan, origin: Mapping[str, Any], accounts: Mapping[str, Account]) -> dict[str, Any]:
    """What travels in the manifest: enough to read the checkpoint without its source, and to find that source again."""
    return {
        "format": "dsv4",
        "dsv4_version": importlib.metadata.version("dsv4-convert"),
        "names_table": TABLE_VERSION,
        "dialect": planned.dialect.value,
        "storage": planned.storage.value,
        "layout": planned.layout.value,
        "layers": list(planned.layers),
        "config": planned.config.to_json(),
        "source": dict(origin),
        "tensors": {"used": planned.tensors, "dropped": _by_reason(planned.dropped)},
        "rounding": rounding_summary(planned, accounts),
    }


def _by_reason(dropped: Mapping[str, str]) -> dict[str, int]:
    """How many tensors were left out, by reason; their names are in ``dsv4_sources.json``."""
    counts: dict[str, int] = {}
    for reason in dropped.values():
        counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items()))
