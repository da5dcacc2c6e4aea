"""``dsv4 convert hf-to-orbax``: a checkpoint folder becomes an Orbax checkpoint, chunk by chunk."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dsv4_convert.checkpoint import Checkpoint, open_checkpoint
from dsv4_convert.config import Config
from dsv4_convert.convert.chunks import ChunkMaker
from dsv4_convert.convert.plan import Plan, plan
from dsv4_convert.convert.storage import Piece, Storage
from dsv4_convert.names import TABLE_VERSION
from dsv4_convert.store import LeafSpec, WriteSummary, write_checkpoint

#: Small files of the source that go along; they are copied as they are where they exist.
_COMPANIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")

#: Called with (bytes written, bytes in total, path of the leaf) after every chunk.
Progress = Callable[[int, int, str], None]


def hf_to_orbax(
    source: Path,
    destination: Path,
    *,
    storage: Storage = Storage.BFLOAT16,
    layers: Iterable[int] | None = None,
    name: str | None = None,
    revision: str | None = None,
    workers: int = 2,
    restart: bool = False,
    overwrite: bool = False,
    announce: Callable[[Plan], None] = lambda _: None,
    progress: Progress | None = None,
) -> tuple[Plan, WriteSummary]:
    """Convert a local checkpoint folder; memory holds one chunk per worker, never a layer.

    Args:
        source: folder with ``config.json`` and safetensors shards, in any dialect of :mod:`dsv4_convert.names`.
        destination: folder to create; an interrupted run leaves it absent and is continued by the same call.
        storage: how weights are stored.
        layers: convert these layers and the model level only; None for all.
        name: what the manifest calls the source, such as its repository; the folder's name if None.
        revision: the source's commit; what the folder itself says if None.
        workers: threads.
        restart: discard an interrupted run instead of going on with it.
        overwrite: replace a finished conversion at ``destination``.
        announce: called with the plan before anything is written.
        progress: called after every chunk.

    Raises:
        BadInput: the source is corrupt, incomplete or not a DeepSeek-V4 text model.
        UsageError: the destination exists, or a layer does not.
        ResourceError: the disk is full.
    """
    with open_checkpoint(source, partial=layers is not None) as checkpoint:
        config = Config.from_hf(checkpoint.config, where=str(checkpoint.root / "config.json"))
        planned = plan(checkpoint, config, storage, layers=layers)
        announce(planned)
        maker = ChunkMaker(checkpoint, config)
        origin = {
            "name": name or checkpoint.root.resolve().name,
            "revision": revision or checkpoint.revision,
            "shards": {file.name: file.stat().st_size for file in checkpoint.shards},
        }
        summary = write_checkpoint(
            destination,
            [_spec(piece, maker) for piece in planned.pieces],
            fingerprint={"source": origin, "storage": storage.value, "names_table": TABLE_VERSION},
            metadata=lambda _: _metadata(planned, origin),
            extra_files=lambda _: _companions(checkpoint),
            workers=workers,
            progress=progress,
            restart=restart,
            overwrite=overwrite,
        )
    return planned, summary


def _spec(piece: Piece, maker: ChunkMaker) -> LeafSpec:
    return LeafSpec(
        path=piece.path,
        shape=piece.shape,
        dtype=piece.dtype,
        chunk_shape=piece.chunk_shape,
        chunks=lambda index: maker.chunk(piece, index),
        sources=piece.sources,
        rule=piece.leaf.rule.path,
    )


def _metadata(planned: Plan, origin: Mapping[str, Any]) -> dict[str, Any]:
    """What travels in the manifest: enough to read the checkpoint without its source, and to find that source again."""
    dropped: dict[str, list[str]] = {}
    for tensor, reason in sorted(planned.dropped.items()):
        dropped.setdefault(reason, []).append(tensor)
    return {
        "format": "dsv4",
        "dsv4_version": importlib.metadata.version("dsv4"),
        "names_table": TABLE_VERSION,
        "dialect": planned.dialect.value,
        "storage": planned.storage.value,
        "layers": list(planned.layers),
        "config": planned.config.to_json(),
        "source": dict(origin),
        "tensors_used": planned.tensors,
        "tensors_dropped": dropped,
        "rounded_to_bfloat16": list(planned.rounded),
    }


def _companions(checkpoint: Checkpoint) -> dict[str, bytes]:
    files = (checkpoint.root / name for name in _COMPANIONS)
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def dry_run(source: Path, *, storage: Storage = Storage.BFLOAT16, layers: Iterable[int] | None = None) -> Plan:
    """The plan of :func:`hf_to_orbax`, and nothing else; raises what that would raise about the source."""
    with open_checkpoint(source, partial=layers is not None) as checkpoint:
        config = Config.from_hf(checkpoint.config, where=str(checkpoint.root / "config.json"))
        return plan(checkpoint, config, storage, layers=layers)
