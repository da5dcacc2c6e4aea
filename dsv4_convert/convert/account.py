"""The account of a source tensor: its digest, and what rounding did to it. Made while the tensor is converted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsv4_convert.checkpoint import Checkpoint
from dsv4_convert.convert.plan import Plan
from dsv4_convert.convert.sources import Shard, Sources, SourceTensor, targets_of
from dsv4_convert.convert.storage import Form
from dsv4_convert.formats.exactness import Rounding, rounding
from dsv4_convert.spec.conversion import Storage
from dsv4_convert.spec.coverage import Source
from dsv4_convert.spec.names import Rule
from dsv4_convert.store import LeafRecord
from dsv4_convert.store.digests import Hasher

#: Pages of the source that are in memory at a time, at most, while it is hashed.
_PART_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class Account:
    """The account of one source tensor and its scales."""

    digests: Mapping[str, str]
    rounding: Rounding

    def to_json(self) -> dict[str, Any]:
        """The account as the journal stores it."""
        return {"digests": dict(self.digests), "rounding": dataclasses.asdict(self.rounding)}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Account:
        """Inverse of :meth:`to_json`."""
        return cls(entry["digests"], Rounding(**entry["rounding"]))


def accounts_of(side_records: Mapping[str, Any]) -> dict[str, Account]:
    """The accounts by weight, out of the side records of a run."""
    return {weight: Account.from_json(entry) for weight, entry in side_records.items()}


def account(checkpoint: Checkpoint, source: Source, rule: Rule, storage: Storage) -> Account:
    """Hash a tensor and its scales; count the values that the conversion rounds."""
    digests = {name: tensor_digest(checkpoint, name) for name in source.names}
    converted = storage is not Storage.SOURCE and rule.kind.follows_dtype
    return Account(digests, _rounding(checkpoint, source, storage.dtype) if converted else Rounding())


def tensor_digest(checkpoint: Checkpoint, name: str, *, like: str | None = None) -> str:
    """The digest of the stored bytes of one tensor, in bounded memory; ``like`` as for :class:`Hasher`."""
    hasher = Hasher(like)
    stored = checkpoint.read_bytes(name)
    for start in range(0, len(stored), _PART_BYTES):
        hasher.update(stored[start : start + _PART_BYTES])
        if len(stored) > _PART_BYTES:  # the pages of a smaller tensor stay for its chunk, which gives them back
            checkpoint.release(name)
    return hasher.digest()


def _rounding(checkpoint: Checkpoint, source: Source, dtype: np.dtype[Any]) -> Rounding:
    info = checkpoint.tensors[source.weight]
    stored = checkpoint.read(source.weight)
    scale = checkpoint.read(source.scale) if source.scale is not None else None
    if stored.ndim != 2:
        return rounding(stored, scale, dtype=dtype)
    total, height = Rounding(), 1 if source.block is None else source.block[0]
    step = max(height, _PART_BYTES // max(1, info.nbytes // info.shape[0]) // height * height)
    for start in range(0, stored.shape[0], step):
        scales = None if scale is None else scale[start // height : -(-(start + step) // height)]
        total += rounding(stored[start : start + step], scales, dtype=dtype, block=source.block)
        if step < stored.shape[0]:
            for name in source.names:
                checkpoint.release(name)
    return total


def to_account(planned: Plan) -> frozenset[str]:
    """The weights that are hashed and checked for rounding on their own.

    A chunk that is a whole published tensor, byte for byte, needs neither: its digest is the tensor's digest, and
    nothing can round.
    """
    if planned.storage is not Storage.SOURCE:
        return frozenset(planned.sources)
    return frozenset(
        source.weight
        for stored_leaf in planned.stored_leaves
        for leaf in stored_leaf.leaves
        if leaf.fused or (not leaf.stacked and stored_leaf.layout.chunk_count != 1)
        for source in leaf.sources
    )


def assemble(
    planned: Plan,
    accounts: Mapping[str, Account],
    records: Mapping[str, LeafRecord],
    shards: Mapping[str, Shard],
) -> Sources:
    """The account of all source tensors, once everything is written."""
    digests = {name: digest for entry in accounts.values() for name, digest in entry.digests.items()}
    if planned.storage is Storage.SOURCE:
        for stored_leaf in planned.stored_leaves:
            for index, digest in zip(
                stored_leaf.layout.chunk_indices(), records[stored_leaf.path].chunk_digests, strict=True
            ):
                (name,) = planned.names_of(stored_leaf, index)
                digests.setdefault(name, digest)
    targets = targets_of((stored_leaf.path, stored_leaf.sources) for stored_leaf in planned.stored_leaves)
    in_order = sorted(planned.infos.values(), key=lambda info: (info.file.name, info.start))
    return Sources(
        shards=shards,
        tensors={
            info.name: SourceTensor(
                shard=info.file.name,
                dtype=info.dtype,
                shape=info.shape,
                digest=digests.get(info.name),
                targets=targets.get(info.name, ()),
                dropped=planned.dropped.get(info.name),
            )
            for info in in_order
        },
    )


def rounding_summary(planned: Plan, accounts: Mapping[str, Account]) -> dict[str, Any]:
    """The manifest's record of rounding: the total, and the number of changed values of every leaf that has any."""
    total = sum((entry.rounding for entry in accounts.values()), Rounding())
    leaves: dict[str, int] = {}
    for stored_leaf in planned.stored_leaves:
        weights = (source.weight for leaf in stored_leaf.leaves for source in leaf.sources)
        changed = sum(accounts[weight].rounding.rounded for weight in weights if weight in accounts)
        if changed and stored_leaf.form is Form.DECODED:
            leaves[stored_leaf.path] = changed
    largest = total.largest_relative
    return {
        "values": total.values,
        "rounded": total.rounded,
        # JSON has no infinity: a value that overflows.
        "largest_relative": largest if math.isfinite(largest) else "inf",
        "leaves": leaves,
    }


def describe_rounding(planned: Plan, side_records: Mapping[str, Any]) -> str:
    """One sentence about the rounding that a run counted."""
    if planned.storage is Storage.SOURCE:
        return "exact: the published bytes"
    entry = rounding_summary(planned, accounts_of(side_records))
    if not entry["rounded"]:
        return f"exact: none of {entry['values']:,} converted values is rounded"
    return (
        f"rounded: {entry['rounded']:,} of {entry['values']:,} converted values, the largest by "
        f"{float(entry['largest_relative']):.2g} of itself; --dtype float32 and source keep them exact"
    )
