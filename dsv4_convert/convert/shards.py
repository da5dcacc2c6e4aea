"""The order in which a conversion works through the shards of its source, and when it is done with one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from dsv4_convert.checkpoint.streamed import StreamedCheckpoint
from dsv4_convert.convert.plan import Plan
from dsv4_convert.store import Chunk


def as_arriving(source: object) -> StreamedCheckpoint | None:
    """The source, if its shards arrive while it is read."""
    return source if isinstance(source, StreamedCheckpoint) else None


@dataclass(frozen=True, slots=True)
class Task:
    """One step of a conversion.

    Attributes:
        what: a chunk to write, or the name of a weight to account for.
        shards: the files of the source that it reads.
        order: its place in the order of the work.
        read: bytes of the source, as progress counts them.
        written: canonical bytes of the destination.
    """

    what: Chunk | str
    shards: tuple[str, ...]
    order: tuple[int, ...]
    read: int = 0
    written: int = 0


def in_order(planned: Plan, weights: Iterable[str], chunks: Iterable[Chunk]) -> list[Task]:
    """The tasks in the order of the source, so that it is read from its first byte to its last.

    A chunk comes when the last byte that it needs does, the account of a weight just before its chunks.
    """
    stored_leaves = {stored_leaf.path: stored_leaf for stored_leaf in planned.stored_leaves}
    number = {name: number for number, name in enumerate(sorted({info.file.name for info in planned.infos.values()}))}

    def files(names: Sequence[str]) -> tuple[str, ...]:
        return tuple({planned.infos[name].file.name for name in names})

    def last(names: Sequence[str]) -> tuple[int, int]:
        return max((number[planned.infos[name].file.name], planned.infos[name].start) for name in names)

    tasks = []
    for weight in weights:
        names = planned.sources[weight][0].names
        tasks.append(Task(weight, files(names), (*last(names), -1)))
    for chunk in chunks:
        stored_leaf, index = stored_leaves[chunk.leaf.path], chunk.index
        order: tuple[int, ...] = (0,)
        if names := planned.names_of(stored_leaf, index):
            part = stored_leaf.part(index)
            order = (*last(names), part.expert if part.expert is not None else part.rows.start)
        tasks.append(Task(chunk, files(names), order, planned.bytes_of(stored_leaf, index), chunk.nbytes))
    return sorted(tasks, key=lambda task: task.order)


class ShardUse:
    """The shards that some tasks read. An arriving source fetches them in order and gives up each after its last task.

    A context manager: a failure in its block ends what readers of the source may be waiting for.
    """

    def __init__(self, source: StreamedCheckpoint | None, shards: Iterable[str], tasks: Sequence[Task]) -> None:
        """``shards`` are those of the whole conversion. One that no task reads is given up at once."""
        self._source = source
        self._left = Counter(shard for task in tasks for shard in task.shards)
        if source is not None:
            for shard in sorted(set(shards) - self._left.keys()):
                source.finish(shard)
            if self._left:
                source.start(sorted(self._left))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._source is not None:
            self._source.stop()

    def done(self, task: Task) -> None:
        """Mark a task as done: its results are safe on the disk."""
        for shard in task.shards:
            self._left[shard] -= 1
            if not self._left[shard] and self._source is not None:
                self._source.finish(shard)
