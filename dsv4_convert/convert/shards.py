"""Which shards a conversion still needs: the order of the work, and the moment at which a shard is done with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Protocol, runtime_checkable

from dsv4_convert.convert.plan import Plan
from dsv4_convert.convert.storage import Piece
from dsv4_convert.store.writer import Rank

Index = tuple[int, ...]


@runtime_checkable
class Arriving(Protocol):
    """A source whose shards arrive while it is read."""

    #: Bytes that have arrived.
    fetched: int
    #: Called when some more have.
    on_bytes: Callable[[], None]

    @property
    def to_fetch(self) -> int:
        """Bytes that are still to come."""

    @property
    def most_on_disk(self) -> int:
        """Bytes that its files will still take, at most, at a time."""

    def rate(self) -> float:
        """Bytes per second that come, from a short try."""

    def fetch_small_files(self) -> None:
        """Bring what belongs to it beside the shards."""

    def start(self, order: Sequence[str]) -> None:
        """Begin to fetch these shards, by name, in this order."""

    def finish(self, shard: str) -> None:
        """Nothing of this shard is needed any more."""

    def stop(self) -> None:
        """End what readers may be waiting for."""


def as_arriving(source: object) -> Arriving | None:
    """The source, if its shards arrive while it is read."""
    return source if isinstance(source, Arriving) else None


class ShardUse:
    """Ranks the work by the place of its source, and counts down what is left to do with each shard.

    The source is then read from its first byte to its last, and shards can be fetched, and given up, one by one.
    """

    def __init__(self, planned: Plan, notes: Sequence[str], source: object, *, ahead: bool = True) -> None:
        """``ahead`` fetches shards before they are asked for; not so where others do a part of the work."""
        self._planned = planned
        self._source = as_arriving(source)
        self._pieces = {piece.path: piece for piece in planned.pieces}
        names = sorted({info.file.name for info in planned.infos.values()})
        self._number = {name: number for number, name in enumerate(names)}
        self._left: Counter[str] = Counter()
        for piece in planned.pieces:
            for index in piece.layout.chunk_indices():
                self._left.update(self._shards_of(planned.names_of(piece, index)))
        for note in notes:
            self._left.update(self._shards_of(self._names_of_note(note)))
        self._ahead = ahead
        self._begun = False
        self._lock = Lock()
        #: Bytes of the source whose chunks are written.
        self.read = 0

    def rank(self, piece: Piece, index: Index) -> Rank:
        """Of a chunk: shard and offset of the last byte that it needs."""
        names = self._planned.names_of(piece, index)
        if not names:
            return (0,)
        shard, start = self._place(names)
        part = piece.part(index)
        return shard, start, part.expert if part.expert is not None else part.rows.start

    def rank_of_note(self, weight: str) -> Rank:
        """Of the account of a tensor: just before its chunks."""
        return *self._place(self._names_of_note(weight)), -1

    def begin(self) -> None:
        """Before anything is read: let the shards come that are still needed."""
        if self._source is None or self._begun:
            return
        with self._lock:
            if not self._begun:
                self._source.start([name for name in self._number if self._ahead and self._left[name] > 0])
                self._begun = True

    def committed(self, name: str, index: Index | None) -> None:
        """A chunk (leaf, index) or an account (weight, None) is safe on the disk. One call at a time."""
        if index is None:
            names = self._names_of_note(name)
        else:
            piece = self._pieces[name]
            names = self._planned.names_of(piece, index)
            self.read += self._planned.bytes_of(piece, index)
        for shard in self._shards_of(names):
            self._left[shard] -= 1
            if not self._left[shard] and self._source is not None:
                self._source.finish(shard)

    def _place(self, names: Sequence[str]) -> tuple[int, int]:
        infos = [self._planned.infos[name] for name in names]
        return max((self._number[info.file.name], info.start) for info in infos)

    def _names_of_note(self, weight: str) -> Sequence[str]:
        source, _ = self._planned.sources[weight]
        return (weight,) if source.scale is None else (weight, source.scale)

    def _shards_of(self, names: Sequence[str]) -> set[str]:
        return {self._planned.infos[name].file.name for name in names}
