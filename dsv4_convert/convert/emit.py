"""The tensors of a Hugging Face checkpoint, made again out of a converted one, piece by piece.

The way back of :mod:`.chunks`. Every source tensor is a run of chunks of the store, in the order of its rows (for a
fused tensor: expert by expert, gate rows before up rows), so it can be written without ever being whole in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsv4_convert.checkpoint import TensorInfo
from dsv4_convert.checkpoint.dtypes import DTYPES
from dsv4_convert.checkpoint.header import stored_nbytes
from dsv4_convert.convert.plan import Plan, plan
from dsv4_convert.convert.sources import Sources, SourceTensor, stored_layers
from dsv4_convert.convert.storage import Form, StoredLeaf
from dsv4_convert.formats import cast_plain, quantize_fp4, quantize_fp8
from dsv4_convert.formats.weight import decode_weight
from dsv4_convert.spec.names import Dialect
from dsv4_convert.store import Store

Array = np.ndarray[Any, Any]
#: Bytes of a weight's scales that wait while its codes are written.
_HELD_BYTES = 64 << 20
_SPELLING = {stored.array: name for name, stored in DTYPES.items() if name in ("BF16", "F32", "I64", "I32")}


@dataclasses.dataclass(frozen=True)
class Emitted:
    """One tensor to write. ``chunks`` gives its bytes in order, as C-contiguous arrays."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Array]]
    #: Digest that the bytes must have; None where they need not be those of the source.
    digest: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return stored_nbytes(self.dtype, self.shape)


@dataclasses.dataclass
class Fidelity:
    """Per weight that was quantised again: the number of values that decoding does not reproduce, 0 included."""

    changed: dict[str, int] = dataclasses.field(default_factory=dict)

    def count(self, weight: str, values: int) -> None:
        """``values`` of a weight changed."""
        self.changed[weight] = values


@dataclasses.dataclass(frozen=True)
class _Described:
    """The source as the account of its tensors describes it."""

    root: Path
    tensors: Mapping[str, TensorInfo]
    absent: frozenset[str] = frozenset()


class Emitter:
    """Makes the tensors of the source, or of a plain copy of it, out of a converted checkpoint."""

    def __init__(self, store: Store, sources: Sources) -> None:
        self._store = store
        self._sources = sources
        self.storage = store.conversion.storage
        infos: dict[str, TensorInfo] = {}
        for name, tensor in sources.tensors.items():
            if not tensor.targets:
                continue  # left out, such as the stages after the layers that were asked for
            # Offsets do not matter here; the size does.
            nbytes = stored_nbytes(tensor.dtype, tensor.shape)
            file = store.folder / tensor.shard
            infos[name] = TensorInfo(name=name, dtype=tensor.dtype, shape=tensor.shape, file=file, start=0, end=nbytes)
        self._plan: Plan = plan(
            _Described(store.folder, infos),
            store.conversion.config,
            self.storage,
            layers=stored_layers(store),
        )
        self.fidelity = Fidelity()

    def published(self) -> Iterator[Emitted]:
        """The tensors of the source, byte for byte, from ``source`` storage; in the order of the source."""
        runs = self._runs()
        for name, tensor in self._sources.tensors.items():
            if name in runs:
                yield Emitted(name, tensor.dtype, tensor.shape, self._reader(runs[name]), tensor.digest)

    def plain(self) -> Iterator[Emitted]:
        """Full-precision tensors ``[out, in]`` under the published names, from decoded storage."""
        for stored_leaf in self._plan.stored_leaves:
            rule, experts = stored_leaf.leaf.rule, self._plan.config.experts_of(stored_leaf.leaf.layer)
            for expert in range(experts) if rule.per_expert else (None,):
                numbers = rule.numbers(self._plan.config, stored_leaf.leaf.layer, expert)
                name = rule.template(Dialect.PUBLISHED).format(*numbers)
                run = [index for index in stored_leaf.layout.chunk_indices() if expert is None or index[0] == expert]
                spelling = _SPELLING[stored_leaf.dtype]
                yield Emitted(
                    name, spelling, stored_leaf.leaf.source_shape, self._reader([(stored_leaf, index) for index in run])
                )

    def quantized(self) -> Iterator[Emitted]:
        """The tensors of the source in their published form, quantised again from decoded storage."""
        runs = self._runs()
        weight_of = {source.scale: source.weight for source, _ in self._plan.sources.values() if source.scale}
        quantizers: dict[str, _Quantizer] = {}
        for name, tensor in self._in_pairs(weight_of):
            weight = weight_of.get(name, name)
            if weight not in runs:
                continue
            source, _ = self._plan.sources[weight]
            if source.scale is None or source.block is None:
                rows = self._reader(runs[name], DTYPES[tensor.dtype].array)
                yield Emitted(name, tensor.dtype, tensor.shape, rows)
                continue
            if weight not in quantizers:
                scale = self._sources.tensors[source.scale]
                kind = self._sources.tensors[weight].dtype
                rows = self._whole_tiles(runs[weight], source.block[0])
                quantizers[weight] = _Quantizer(weight, kind, scale.dtype, source.block, rows, self.fidelity)
            quantizer = quantizers[weight]
            yield Emitted(name, tensor.dtype, tensor.shape, quantizer.scales if name in weight_of else quantizer.codes)

    def _in_pairs(self, weight_of: Mapping[str, str]) -> Iterator[tuple[str, SourceTensor]]:
        """The source's tensors, each scale just behind its weight where they share a shard."""
        tensors = self._sources.tensors
        scale_of = {weight: scale for scale, weight in weight_of.items()}
        for name, tensor in tensors.items():
            partner = weight_of.get(name) or scale_of.get(name)
            together = partner is not None and tensors[partner].shard == tensor.shard
            if name in weight_of and together:
                continue
            yield name, tensor
            if partner is not None and together:
                yield partner, tensors[partner]

    def _runs(self) -> dict[str, list[tuple[StoredLeaf, tuple[int, ...]]]]:
        """The chunks that hold each source tensor, by its name, in the order of its rows."""
        found: dict[str, list[tuple[tuple[int, int, int], StoredLeaf, tuple[int, ...]]]] = {}
        for stored_leaf in self._plan.stored_leaves:
            for index in stored_leaf.layout.chunk_indices():
                part = stored_leaf.part(index)
                name = part.source.scale if stored_leaf.form is Form.SCALE else part.source.weight
                assert name is not None
                key = (part.expert or 0, stored_leaf.leaf.rule.half or 0, part.rows.start)
                found.setdefault(name, []).append((key, stored_leaf, index))
        return {
            name: [(stored_leaf, index) for _, stored_leaf, index in sorted(run, key=lambda entry: entry[0])]
            for name, run in found.items()
        }

    def _reader(
        self, run: list[tuple[StoredLeaf, tuple[int, ...]]], dtype: np.dtype[Any] | None = None
    ) -> Callable[[], Iterator[Array]]:
        """The rows of the chunks; in ``dtype``, where the weight was published in another one than it is stored in."""

        def rows() -> Iterator[Array]:
            for stored_leaf, index in run:
                chunk = self._rows(stored_leaf, index)
                yield chunk if dtype in (None, chunk.dtype) else cast_plain(chunk, dtype=dtype)

        return rows

    def _rows(self, stored_leaf: StoredLeaf, index: tuple[int, ...]) -> Array:
        """A chunk as rows of its source."""
        chunk = self._store.open_leaf(stored_leaf.path).read_chunk(index)
        if stored_leaf.form is not Form.DECODED:
            return chunk
        if chunk.ndim > 2:
            chunk = chunk.reshape(chunk.shape[-2:])
        return np.ascontiguousarray(chunk.T) if stored_leaf.transposed else chunk

    def _whole_tiles(self, run: list[tuple[StoredLeaf, tuple[int, ...]]], height: int) -> Callable[[], Iterator[Array]]:
        """Rows in whole tiles of ``height``: single chunks, or the whole tensor if chunks would cut a tile."""
        if len(run) > 1 and run[0][0].rows_per_chunk % height:
            return lambda: iter([np.concatenate([self._rows(stored_leaf, index) for stored_leaf, index in run])])
        return self._reader(run)


@dataclasses.dataclass
class _Quantizer:
    """Quantises one weight to its published form: its codes, and then the scales that were found with them."""

    name: str
    dtype: str
    scale_dtype: str
    block: tuple[int, int]
    rows: Callable[[], Iterator[Array]]
    fidelity: Fidelity
    #: The scales that were found with the codes; None where there are too many to hold, or nobody has found them yet.
    _scales: list[Array] | None = None

    def codes(self) -> Iterator[Array]:
        """The codes, run by run. Counts the values that decoding them would not give back."""
        held: list[Array] | None = []
        nbytes = changed = 0
        for rows in self.rows():
            found, scale = self._quantized(rows)
            again = decode_weight(found, scale, dtype=rows.dtype, block=self.block)
            changed += int(np.count_nonzero(again != rows))
            nbytes += scale.nbytes
            held = None if held is None or nbytes > _HELD_BYTES else [*held, scale]
            yield found
        self._scales = held
        self.fidelity.count(self.name, changed)

    def scales(self) -> Iterator[Array]:
        """The scales of all runs, quantised again where they are not held."""
        held, self._scales = self._scales, None
        yield from (self._quantized(rows)[1] for rows in self.rows()) if held is None else held

    def _quantized(self, rows: Array) -> tuple[Array, Array]:
        """Codes and scales of one run of rows."""
        if self.dtype != "F8_E4M3":
            return quantize_fp4(rows)
        powers = self.scale_dtype == "F8_E8M0"
        codes, scale = quantize_fp8(rows, block=self.block, scale_format="e8m0" if powers else "float32")
        return codes.view(ml_dtypes.float8_e4m3fn), scale
