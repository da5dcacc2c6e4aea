"""``dsv4 convert hf-to-orbax``: order, threads, accounts and progress of a conversion to Orbax, chunk by chunk."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dsv4_convert.checkpoint import Checkpoint
from dsv4_convert.checkpoint.locate import open_source
from dsv4_convert.convert.account import Account, account, accounts_of, assemble, rounding_summary, to_account
from dsv4_convert.convert.chunks import ChunkMaker
from dsv4_convert.convert.layouts import layout_files
from dsv4_convert.convert.plan import MAX_MEMORY, Plan, plan
from dsv4_convert.convert.shards import ShardUse, Task, as_arriving, in_order
from dsv4_convert.convert.sources import SOURCES_FILE, Shard
from dsv4_convert.folders import PathLike
from dsv4_convert.show.text import for_terminal
from dsv4_convert.spec.conversion import Layout, Storage
from dsv4_convert.spec.names import TABLE_VERSION
from dsv4_convert.store import CheckpointWriter, Chunk, Compression, Processes, WriteSummary
from dsv4_convert.store.orbax_processes import current_processes
from dsv4_convert.store.threads import in_threads

#: Small files of the source that are copied unchanged if they exist.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """How a plan is carried out.

    Attributes:
        max_memory: bytes beyond the interpreter with its imports.
        workers: maximum number of threads. None: two more than there are cores, so that cores have work while some
            threads wait for the disk.
        name: the source's name in the manifest, such as its repository. None: the folder's name.
        revision: the source's commit. None: the commit that the folder records.
        restart: discard an interrupted run instead of resuming it.
        overwrite: replace a finished conversion at the destination.

    Examples:
        >>> plan, summary = hf_to_orbax(Path("checkpoint"), "again", options=ConversionOptions(workers=1))
    """

    max_memory: int = MAX_MEMORY
    workers: int | None = None
    name: str | None = None
    revision: str | None = None
    restart: bool = False
    overwrite: bool = False


#: Called with how far the conversion is, one call at a time, from any thread.
Progress = Callable[[Advance], None]


def hf_to_orbax(
    source: PathLike,
    destination: PathLike,
    *,
    storage: Storage = Storage.BFLOAT16,
    layers: Iterable[int] | None = None,
    layout: Layout = Layout.DSV4,
    compression: Compression = "none",
    options: ConversionOptions = ConversionOptions(),
    progress: Progress = lambda _: None,
) -> tuple[Plan, WriteSummary]:
    """Convert a published checkpoint: :func:`plan` and :func:`carry_out`.

    Args:
        source: a folder with ``config.json`` and safetensors shards, in any dialect of :mod:`dsv4_convert.spec.names`;
            or a repository or a bucket, as :func:`~dsv4_convert.checkpoint.locate.open_source` opens them.
        destination: folder to create, or URL of a bucket.
        storage: how weights are stored.
        layers: convert these layers and the model level only; None for all.
        layout: whose parameter tree is written.
        compression: see :class:`dsv4_convert.store.CheckpointWriter`.
        options: how the plan is carried out.
        progress: see :func:`carry_out`.

    Raises:
        BadInput: the source is corrupt, incomplete or not a DeepSeek-V4 text model.
        UsageError: the destination exists, or a layer does not.
        ResourceError: the disk is full, or the memory allowed is too small.

    Examples:
        >>> plan, summary = hf_to_orbax("checkpoint", "converted")
    """
    layers = None if layers is None else tuple(layers)
    with open_source(os.fspath(source), layers=layers) as checkpoint:
        config = checkpoint.architecture()
        planned = plan(checkpoint, config, storage, layers=layers, layout=layout, compression=compression)
        summary = carry_out(planned, checkpoint, destination, options, progress=progress)
    return planned, summary


def carry_out(
    planned: Plan,
    checkpoint: Checkpoint,
    destination: str | os.PathLike[str],
    options: ConversionOptions = ConversionOptions(),
    *,
    processes: Processes | None = None,
    progress: Progress = lambda _: None,
) -> WriteSummary:
    """Carry out a plan; memory holds one chunk per worker, never a layer.

    Args:
        planned: the plan.
        checkpoint: the source that the plan was made of, open.
        destination: folder to create, or URL of a bucket such as ``gs://bucket/model``. It stays absent until the
            conversion is complete; the same call resumes an interrupted run.
        options: memory, threads, names, and how to treat earlier results.
        processes: the processes that share the work. None: those of ``jax.distributed``, if it is initialised.
        progress: called at the start, with the progress of an interrupted run, and after every chunk.

    Raises:
        BadInput: the source is corrupt or changed.
        UsageError: the destination exists, or an interrupted run had another source or other settings.
        ResourceError: the disk is full, the memory allowed is too small, or another process writes the same
            destination.
    """
    workers = planned.workers(options.max_memory, options.workers)
    checkpoint.fetch_small_files()
    companions = _companions(checkpoint) | layout_files(planned.layout, planned.config)
    shards = {name: Shard(size=size, sha256=checkpoint.digests.get(name)) for name, size in checkpoint.sizes.items()}
    origin = {
        "name": options.name or checkpoint.repository or for_terminal(checkpoint.root.resolve().name),
        "revision": options.revision or checkpoint.revision,
        "shards": {name: shard.size for name, shard in shards.items()},
    }
    writer = CheckpointWriter(
        destination,
        [stored_leaf.spec for stored_leaf in planned.stored_leaves],
        fingerprint={
            "source": origin,
            # A commit says more than times do, where it is known.
            "changed": None if checkpoint.revision is not None else dict(checkpoint.changed()),
            "config": hashlib.sha256(companions["config.json"]).hexdigest(),
            "storage": planned.storage.value,
            "layout": planned.layout.value,
            "names_table": TABLE_VERSION,
        },
        compression=planned.compression,
        processes=processes or current_processes(),
        restart=options.restart,
        overwrite=options.overwrite,
    )
    with writer:
        _write_chunks(planned, checkpoint, writer, workers, progress)
        summary = writer.finish()
        accounts = accounts_of(summary.side_records)
        sources = assemble(planned, accounts, summary.records, shards)
        writer.commit(_metadata(planned, origin, accounts), {**companions, SOURCES_FILE: sources.to_bytes()})
    return summary


def _write_chunks(
    planned: Plan, checkpoint: Checkpoint, writer: CheckpointWriter, workers: int, progress: Progress
) -> None:
    """Write the chunks that are missing, and account for the weights, in the order of the source."""
    weights = sorted(to_account(planned) - writer.side_records.keys())
    missing = in_order(planned, weights, writer.pending())
    mine = writer.processes.share(missing, lambda task: task.written)
    stored_leaves = {stored_leaf.path: stored_leaf for stored_leaf in planned.stored_leaves}
    maker = ChunkMaker(checkpoint, experts=planned.config.n_routed_experts)

    def work(task: Task) -> None:
        if isinstance(task.what, Chunk):
            writer.write(task.what, maker.chunk(stored_leaves[task.what.leaf.path], task.what.index))
        else:
            source, rule = planned.sources[task.what]
            writer.add_side_record(task.what, account(checkpoint, source, rule, planned.storage).to_json())

    arriving = as_arriving(checkpoint)
    every = (
        planned.bytes_of(stored_leaf, index)
        for stored_leaf in planned.stored_leaves
        for index in stored_leaf.layout.chunk_indices()
    )
    read = sum(every) - sum(task.read for task in missing)
    written = writer.kept_bytes
    to_write = written + sum(task.written for task in mine)
    fetched = None if arriving is None else 0
    telling = _Telling(Advance(read, planned.bytes_read, written, to_write, "", fetched), progress)
    if arriving is not None:
        arriving.on_bytes = lambda: telling.update(fetched=arriving.fetched)
    used = {planned.infos[name].file.name for source, _ in planned.sources.values() for name in source.names}
    shards = ShardUse(arriving, used, mine)
    with in_threads(work, mine, workers=workers) as done, shards:
        for task, _ in done:
            shards.done(task)
            if isinstance(task.what, Chunk):
                read, written = read + task.read, written + task.written
                telling.update(read=read, written=written, path=task.what.leaf.path)


class _Telling:
    """Tells progress, one call at a time, what the thread that writes and those that fetch have done."""

    def __init__(self, now: Advance, progress: Progress) -> None:
        self._now = now
        self._progress = progress
        self._lock = threading.Lock()
        self.update()

    def update(self, **changes: Any) -> None:
        """Some fields of the :class:`Advance` have changed."""
        with self._lock:
            self._now = dataclasses.replace(self._now, **changes)
            self._progress(self._now)


def _companions(checkpoint: Checkpoint) -> dict[str, bytes]:
    files = (checkpoint.root / name for name in COMPANIONS)
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def _metadata(planned: Plan, origin: Mapping[str, Any], accounts: Mapping[str, Account]) -> dict[str, Any]:
    """The manifest's metadata: enough to read the checkpoint without its source, and to find that source again."""
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
