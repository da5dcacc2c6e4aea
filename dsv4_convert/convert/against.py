"""Comparing a converted checkpoint with its source, bit by bit: decode everything again and look at what is stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from dsv4_convert.checkpoint import Checkpoint
from dsv4_convert.checkpoint.locate import open_source
from dsv4_convert.checkpoint.planned import check_room
from dsv4_convert.convert.account import tensor_digest
from dsv4_convert.convert.chunks import ChunkMaker
from dsv4_convert.convert.plan import Plan, plan
from dsv4_convert.convert.shards import ShardUse, Task, as_arriving, in_order
from dsv4_convert.convert.sources import Sources, read_sources, stored_layers
from dsv4_convert.convert.storage import StoredLeaf
from dsv4_convert.errors import BadInput
from dsv4_convert.store import Chunk, Store, chunk_digest
from dsv4_convert.store.layout import Index, raw_bytes
from dsv4_convert.store.threads import in_threads

#: Called after every chunk with (bytes compared, bytes in total, path of the leaf).
Progress = Callable[[int, int, str], None]


def compare_with_source(
    store: Store, source: Path | str, progress: Progress = lambda done, total, path: None, *, workers: int = 2
) -> list[str]:
    """Decode the source again and compare every stored byte with the result; memory holds two chunks per worker.

    Args:
        store: the converted checkpoint.
        source: what :func:`~dsv4_convert.checkpoint.locate.open_source` opens.
        progress: called after every chunk.
        workers: threads.

    Returns:
        One line for every difference, which names the leaf, the source tensors, and which of the two has changed since
        the conversion; empty when all is equal.

    Raises:
        BadInput: the source is not a checkpoint of this model, or the checkpoint was not converted by this version.
    """
    made = store.conversion
    sources = read_sources(store)
    with open_source(source, layers=stored_layers(store)) as checkpoint:
        config = checkpoint.architecture()
        if not config.computes_like(made.config):
            return [f"{checkpoint.root / 'config.json'}: another architecture than the one that was converted"]
        planned = plan(checkpoint, config, made.storage, layers=stored_layers(store), layout=made.layout)
        comparison = _Comparison(store, checkpoint, planned, sources)
        return comparison.run(progress, workers)


class _Comparison:
    """Compares the chunks of one store with its source, decoded again."""

    def __init__(self, store: Store, checkpoint: Checkpoint, planned: Plan, sources: Sources) -> None:
        self.store = store
        self.checkpoint = checkpoint
        self.planned = planned
        self.sources = sources
        self.maker = ChunkMaker(checkpoint, experts=planned.config.n_routed_experts)

    def run(self, progress: Progress, workers: int) -> list[str]:
        problems = self._differing_leaves()
        stored_leaves = {leaf.path: leaf for leaf in self.planned.stored_leaves if self._has(leaf)}
        chunks = (Chunk(leaf.spec, index) for leaf in stored_leaves.values() for index in leaf.layout.chunk_indices())
        tasks = in_order(self.planned, (), chunks)
        total, compared = sum(task.written for task in tasks), 0

        def compare(task: Task) -> tuple[str | None, int]:
            assert isinstance(task.what, Chunk)
            return self._compare(stored_leaves[task.what.leaf.path], task.what.index)

        source = as_arriving(self.checkpoint)
        if source is not None:
            check_room(self.checkpoint.root, source.most_on_disk)
        shards = ShardUse(source, (), tasks)
        with in_threads(compare, tasks, workers=workers) as done, shards:
            for task, (problem, nbytes) in done:
                shards.done(task)
                if problem is not None:
                    problems.append(problem)
                compared += nbytes
                assert isinstance(task.what, Chunk)
                progress(compared, total, task.what.leaf.path)
        return problems

    def _differing_leaves(self) -> list[str]:
        """Leaves that only one of the two has, or has in another form."""
        wanted = {stored_leaf.path: stored_leaf for stored_leaf in self.planned.stored_leaves}
        problems = [f"{path}: the source has nothing that fills it" for path in self.store.paths if path not in wanted]
        for path, stored_leaf in wanted.items():
            if path not in self.store.manifest.leaves:
                problems.append(f"{path}: missing, although the source has {', '.join(stored_leaf.sources[:2])}")
            elif self.store.leaf(path) != stored_leaf.layout:
                problems.append(f"{path}: stored as {self.store.leaf(path)}, the source gives {stored_leaf.layout}")
        return problems

    def _has(self, stored_leaf: StoredLeaf) -> bool:
        return (
            stored_leaf.path in self.store.manifest.leaves and self.store.leaf(stored_leaf.path) == stored_leaf.layout
        )

    def _compare(self, stored_leaf: StoredLeaf, index: Index) -> tuple[str | None, int]:
        """The difference in a chunk in words, None if there is none; and the number of bytes compared."""
        try:
            stored = self.store.open_leaf(stored_leaf.path).read_chunk(index)
            made = self.maker.chunk(stored_leaf, index)
        except BadInput as error:
            return str(error), 0
        if _bytes_equal(stored, made):
            return None, made.nbytes
        width = made.dtype.itemsize
        differs = np.frombuffer(raw_bytes(stored), f"V{width}") != np.frombuffer(raw_bytes(made), f"V{width}")
        first = np.unravel_index(int(differs.argmax()), made.shape)
        at = [
            int(inside) + part.start for inside, part in zip(first, stored_leaf.layout.chunk_region(index), strict=True)
        ]
        names = self.planned.names_of(stored_leaf, index)
        return (
            f"{stored_leaf.path}, chunk {index}: {int(differs.sum()):,} of {made.size:,} elements are not what "
            f"{' and '.join(names) or 'ones'} give, the first at {at}: {self._who(stored_leaf, index, stored, names)}"
        ), made.nbytes

    def _who(self, stored_leaf: StoredLeaf, index: Index, stored: np.ndarray, names: tuple[str, ...]) -> str:
        """The side that has changed since the conversion, in words."""
        digests = self.store.manifest.leaves[stored_leaf.path].chunk_digests
        grid = list(stored_leaf.layout.chunk_indices())
        expected = digests[grid.index(index)]
        if chunk_digest(stored, like=expected) != expected:
            return "the stored bytes have changed since"
        for name in names:
            known = self.sources.tensors.get(name)
            if known is None or known.digest is None:
                continue
            if tensor_digest(self.checkpoint, name, like=known.digest) != known.digest:
                return f"{name} in {self.checkpoint.tensors[name].file} is not the tensor that was converted"
        return "neither side has changed since, so it was converted wrongly; please report this"


def _bytes_equal(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two C-contiguous arrays are equal in shape, dtype and every bit, NaNs included."""
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    return bool(np.array_equal(np.frombuffer(raw_bytes(left), np.uint8), np.frombuffer(raw_bytes(right), np.uint8)))
