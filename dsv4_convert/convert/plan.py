"""The plan of a conversion: its reads, its writes, the tensors it drops and its memory, before it reads any weight."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from dsv4_convert.checkpoint import TensorInfo
from dsv4_convert.checkpoint.header import stored_forms
from dsv4_convert.convert.layouts import lay_out
from dsv4_convert.convert.storage import CHUNK_BYTES, Form, StoredLeaf
from dsv4_convert.errors import ResourceError
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.conversion import Layout, Storage
from dsv4_convert.spec.coverage import Source, Stored, resolve
from dsv4_convert.spec.names import Dialect, Rule, Section, Use, check_layers, stage_of
from dsv4_convert.store import Compression

#: Default limit of a conversion's memory, beyond the interpreter with its imports.
MAX_MEMORY = 2 << 30

#: Memory per tensor of the checkpoint: its header, its rule, its place in the plan, its line in the manifest.
_BYTES_PER_TENSOR = 4_000
#: Memory that does not depend on the size: file buffers, the journal, Orbax.
_FIXED_BYTES = 150 << 20


class Described(Protocol):
    """A checkpoint as far as a plan needs it: open in a folder, or known from the Hub by its headers."""

    @property
    def root(self) -> Path:
        """The folder of its files, present or future."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor that can be read."""

    @property
    def absent(self) -> frozenset[str]:
        """Names of tensors that belong to it, but whose shard is not there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole conversion.

    Attributes:
        read: bytes of the source tensors that are used, by dtype.
        written: bytes of the leaves, uncompressed, by dtype.
        tensors: number of source tensors that are used.
        dropped: every tensor that is left out, with the reason.
        inexact: leaves with values that bfloat16 may not hold exactly; the run counts those that it rounds.
    """

    config: Config
    storage: Storage
    layout: Layout
    compression: Compression
    dialect: Dialect
    layers: tuple[int, ...]
    stored_leaves: tuple[StoredLeaf, ...]
    infos: Mapping[str, TensorInfo]
    read: Mapping[str, int]
    written: Mapping[str, int]
    tensors: int
    dropped: Mapping[str, str]
    inexact: tuple[str, ...]

    @property
    def bytes_read(self) -> int:
        """Bytes of all source tensors that are used."""
        return sum(self.read.values())

    @property
    def bytes_written(self) -> int:
        """Bytes of all leaves, uncompressed."""
        return sum(self.written.values())

    @cached_property
    def bytes_on_disk(self) -> int:
        """Bytes of all files, uncompressed: chunks at an edge are stored whole."""
        return sum(
            stored_leaf.layout.chunk_count * stored_leaf.layout.chunk_nbytes for stored_leaf in self.stored_leaves
        )

    @cached_property
    def sources(self) -> Mapping[str, tuple[Source, Rule]]:
        """Every weight of the source that is used, by name, with its scales and its rule."""
        leaves = (leaf for stored_leaf in self.stored_leaves for leaf in stored_leaf.leaves)
        return {source.weight: (source, leaf.rule) for leaf in leaves for source in leaf.sources}

    def names_of(self, stored_leaf: StoredLeaf, index: tuple[int, ...]) -> tuple[str, ...]:
        """The tensors that a chunk is made of."""
        if stored_leaf.form is Form.ONES:
            return ()
        source = stored_leaf.part(index).source
        if stored_leaf.form is Form.SCALE:
            return (source.scale,) if source.scale is not None else ()
        return tuple(
            name for name in (source.weight, source.scale if stored_leaf.form is Form.DECODED else None) if name
        )

    def bytes_of(self, stored_leaf: StoredLeaf, index: tuple[int, ...]) -> int:
        """Bytes of the source that a chunk is made of: its share of the bytes of the leaf."""
        return (
            self._source_bytes[stored_leaf.path]
            * math.prod(stored_leaf.layout.clipped_shape(index))
            // math.prod(stored_leaf.shape)
        )

    @cached_property
    def _source_bytes(self) -> Mapping[str, int]:
        """Source bytes of every leaf. Leaves that share a tensor (gate and up rows, mixing weights) share its bytes."""
        found = {}
        for stored_leaf in self.stored_leaves:
            nbytes = sum(self.infos[name].nbytes for name in stored_leaf.sources)
            if stored_leaf.leaves and stored_leaf.leaf.fused and stored_leaf.leaf.rule.half is not None:
                nbytes //= 2
            elif stored_leaf.leaves and stored_leaf.row_axis is None and not stored_leaf.leaf.rule.per_expert:
                nbytes = nbytes * stored_leaf.rows_per_chunk // max(1, stored_leaf.leaf.source_shape[0])
            found[stored_leaf.path] = nbytes
        return found

    def memory(self, workers: int) -> int:
        """Peak memory beyond the interpreter with its imports, estimated from above."""
        per_worker = max(self._memory_of(stored_leaf) for stored_leaf in self.stored_leaves)
        return _FIXED_BYTES + len(self.infos) * _BYTES_PER_TENSOR + workers * per_worker

    def workers(self, max_memory: int = MAX_MEMORY, wanted: int | None = None) -> int:
        """How many threads the memory allows, at most ``wanted`` (two more than there are cores, if None).

        Raises:
            ResourceError: not even one.
        """
        limit = wanted or (os.cpu_count() or 1) + 2
        least, more = self.memory(1), self.memory(2) - self.memory(1)
        if least > max_memory:
            largest = max(self.stored_leaves, key=self._memory_of)
            raise ResourceError(
                f"the conversion needs {least / 2**30:.2f} GiB beside the interpreter, allowed are "
                f"{max_memory / 2**30:.2f} GiB; the largest chunk is one of {largest.path}. Raise --max-memory."
            )
        return max(1, min(limit, 1 + (max_memory - least) // more))

    def _memory_of(self, stored_leaf: StoredLeaf) -> int:
        """Memory of one worker at one chunk: the chunk, and the pages of its source."""
        layout = stored_leaf.layout
        if not layout.chunk_count:
            return 0
        padding = layout.chunk_nbytes if math.prod(layout.grid[1:]) > 1 else 0  # an edge chunk is copied
        return layout.chunk_nbytes + padding + self.bytes_of(stored_leaf, (0,) * len(stored_leaf.shape))


def plan(
    checkpoint: Described,
    config: Config,
    storage: Storage,
    *,
    layers: Iterable[int] | None = None,
    layout: Layout = Layout.DSV4,
    compression: Compression = "none",
    chunk_bytes: int = CHUNK_BYTES,
) -> Plan:
    """Resolve every tensor of the checkpoint; reads no weights.

    Raises:
        BadInput: tensors and config do not fit (see :func:`dsv4_convert.spec.coverage.resolve`).
        UsageError: a layer that does not exist, or a layout that does not suit (see :func:`.layouts.lay_out`).
    """
    stored = stored_forms(checkpoint.tensors)
    chosen = check_layers(config, layers)
    # The stages belong to the whole model, and MaxText's tree has no place for them.
    asked = None if layers is None and layout is Layout.DSV4 else chosen
    resolution = resolve(stored, config, layers=asked, where=str(checkpoint.root))
    config = resolution.config
    found = lay_out(layout, resolution.leaves, storage, stored, config, layers=chosen, chunk_bytes=chunk_bytes)
    names = {name for stored_leaf in found for name in stored_leaf.sources}
    read: Counter[str] = Counter()
    for name in names:
        read[stored[name].dtype] += checkpoint.tensors[name].nbytes
    written: Counter[str] = Counter()
    for stored_leaf in found:
        written[stored_leaf.dtype.name] += stored_leaf.nbytes
    unused = {*checkpoint.tensors, *checkpoint.absent} - names
    return Plan(
        config=config,
        storage=storage,
        layout=layout,
        compression=compression,
        dialect=resolution.dialect,
        layers=chosen,
        stored_leaves=tuple(found),
        infos=checkpoint.tensors,
        read=dict(read),
        written=dict(written),
        tensors=len(names),
        dropped={name: _unused(name, layout, config.names.lookup(name, resolution.dialect)) for name in sorted(unused)},
        inexact=tuple(stored_leaf.path for stored_leaf in found if _may_round(stored_leaf, storage, stored)),
    )


def _unused(name: str, layout: Layout, uses: Sequence[Use]) -> str:
    """Why a tensor that is known and in its place is left out."""
    if uses and uses[0].rule.section is Section.VISION:
        return "vision encoder, which belongs to the whole model only"
    if layout is not Layout.DSV4 and stage_of(name) is not None:
        return "draft stage, for which MaxText's tree has no place"
    return "belongs to a layer that was not asked for"


def _may_round(stored_leaf: StoredLeaf, storage: Storage, stored: Mapping[str, Stored]) -> bool:
    """Whether bfloat16 cannot promise to hold the values exactly: float32 weights, or float32 scales."""
    if storage is not Storage.BFLOAT16 or not stored_leaf.leaves or not stored_leaf.leaf.rule.kind.follows_dtype:
        return False
    source = stored_leaf.leaf.sources[0]
    return stored[source.weight].dtype == "F32" or (source.scale is not None and stored[source.scale].dtype == "F32")
