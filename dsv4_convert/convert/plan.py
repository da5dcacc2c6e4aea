"""What a conversion will read, write and leave out, known before the first weight is touched."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping

from dsv4_convert.checkpoint import Checkpoint
from dsv4_convert.config import Config
from dsv4_convert.convert.storage import CHUNK_BYTES, Piece, Storage, pieces
from dsv4_convert.coverage import Stored, resolve
from dsv4_convert.names import Dialect, check_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole conversion.

    ``read`` and ``written`` are bytes by dtype; ``dropped`` names every tensor that is left out, with the reason;
    ``rounded`` names parameters that bfloat16 cannot hold exactly.
    """

    config: Config
    storage: Storage
    dialect: Dialect
    layers: tuple[int, ...]
    pieces: tuple[Piece, ...]
    read: Mapping[str, int]
    written: Mapping[str, int]
    tensors: int
    dropped: Mapping[str, str]
    rounded: tuple[str, ...]

    @property
    def bytes_read(self) -> int:
        """Bytes of all source tensors that are used."""
        return sum(self.read.values())

    @property
    def bytes_written(self) -> int:
        """Bytes of all leaves, uncompressed."""
        return sum(self.written.values())


def plan(
    checkpoint: Checkpoint,
    config: Config,
    storage: Storage,
    *,
    layers: Iterable[int] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Plan:
    """Resolve every tensor of the checkpoint; reads no weights.

    Raises:
        BadInput: tensors and config do not fit (see :func:`dsv4_convert.coverage.resolve`).
        UsageError: a layer that does not exist.
    """
    stored = {name: Stored(info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    chosen = check_layers(config, layers)
    resolution = resolve(stored, config, layers=chosen, where=str(checkpoint.root))
    found = [piece for leaf in resolution.leaves for piece in pieces(leaf, storage, stored, chunk_bytes)]
    read: Counter[str] = Counter()
    names = {name for piece in found for name in piece.sources}
    for name in names:
        read[stored[name].dtype] += checkpoint.tensors[name].nbytes
    written: Counter[str] = Counter()
    for piece in found:
        written[piece.dtype.name] += piece.nbytes
    return Plan(
        config=config,
        storage=storage,
        dialect=resolution.dialect,
        layers=chosen,
        pieces=tuple(found),
        read=dict(read),
        written=dict(written),
        tensors=len(names),
        dropped=resolution.dropped,
        rounded=tuple(piece.path for piece in found if _rounds(piece, storage, stored)),
    )


def _rounds(piece: Piece, storage: Storage, stored: Mapping[str, Stored]) -> bool:
    """Whether bfloat16 cannot promise to hold the values exactly: float32 weights, or float32 scales."""
    if storage is not Storage.BFLOAT16 or not piece.leaf.rule.kind.follows_dtype:
        return False
    source = piece.leaf.sources[0]
    return stored[source.weight].dtype == "F32" or (source.scale is not None and stored[source.scale].dtype == "F32")
