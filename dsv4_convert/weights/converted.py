"""Parameters out of an Orbax checkpoint that dsv4 wrote, whatever its storage."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np

from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.folders import PathLike
from dsv4_convert.formats.weight import PACKED_FP4, ReadPart, StoredMatrix, decode_weight
from dsv4_convert.show.notebook import table
from dsv4_convert.show.units import ranges, size
from dsv4_convert.spec import names
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.conversion import Layout, Storage
from dsv4_convert.store import Store, open_store, verify
from dsv4_convert.store.arrays import StoredArray
from dsv4_convert.store.layout import Region, bounded
from dsv4_convert.weights.parameters import FLOAT32, Array, assembled, grouped, stacked, stored_parts
from dsv4_convert.weights.token_map import token_map

_GROUPED = names.Transform.GROUPED
#: Leaves of a quantised parameter in a store of storage ``source``.
_PARTS = ("weight", "scale")


class Weights:
    """Reads single parameters, or single experts of one, in the model's layout. Nothing is held in memory.

    Examples:
        >>> weights = Weights.open(Path("orbax"))
        >>> weights.read_expert("layers.1.ffn.experts.w1", 3).shape  # [in, out]
        (32, 32)
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._arrays: dict[str, StoredArray] = {}
        metadata, made = store.metadata, store.conversion
        self._storage = made.storage
        if made.layout is not Layout.DSV4:
            raise BadInput(
                f"{store.folder}: has the layout of {made.layout}, for another program; convert the source "
                "again with the default layout"
            )
        if metadata.get("names_table") != names.TABLE_VERSION:
            raise BadInput(
                f"{store.folder}: written with version {metadata.get('names_table')} of the names table, this dsv4 "
                f"has version {names.TABLE_VERSION}; convert the model again"
            )

    @classmethod
    def open(cls, path: PathLike) -> Weights:
        """Open a checkpoint. Raises :class:`BadInput` if dsv4 did not write it."""
        return cls(open_store(path))

    @property
    def config(self) -> Config:
        """The architecture."""
        return self._store.conversion.config

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The conversion's own metadata: source, storage, versions."""
        return self._store.metadata

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers and stages that were converted."""
        stages = {names.stage_of(path) for path in self._store.paths} - {None}
        return (*self._store.conversion.layers, *(layer for layer in self.config.stage_layers if stages))

    @property
    def paths(self) -> tuple[str, ...]:
        """The parameters that were converted, sorted."""
        leaves = self._store.manifest.leaves
        parts = {f"{path}.{part}": path for path in self._scaled for part in _PARTS}
        return tuple(sorted({parts.get(leaf, leaf) for leaf in leaves}))

    @cached_property
    def _scaled(self) -> frozenset[str]:
        """The parameters whose codes and scales are two leaves."""
        stored = self._store.manifest.leaves
        weights = (leaf.removesuffix(".weight") for leaf in stored if leaf.endswith(".weight"))
        return frozenset(path for path in weights if f"{path}.scale" in stored)

    def _repr_html_(self) -> str:
        """What it is, for a notebook."""
        config, made = self.config, self._store.conversion
        stored = [leaf.layout.nbytes for leaf in self._store.manifest.leaves.values()]
        facts = {
            "source": f"{made.source.get('name')}, revision {made.source.get('revision') or 'not recorded'}",
            "storage": made.storage.value,
            "layers": f"{ranges(self.layers)} of {config.num_hidden_layers}",
            "width": f"{config.hidden_size:,}, {config.n_routed_experts:,} routed experts",
            "stored": f"{len(stored):,} leaves, {size(sum(stored))}",
        }
        return table(f"Converted checkpoint {self._store.folder}", facts.items())

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of these weights, as JSON: the manifest, which has the digests of everything else."""
        return {"manifest": hashlib.sha256(self._store.manifest.to_bytes()).hexdigest()}

    def check_layers(self, wanted: tuple[int, ...]) -> None:
        """Raises :class:`UsageError` for layers that this checkpoint does not hold."""
        absent = [layer for layer in wanted if layer not in self.layers]
        if absent:
            raise UsageError(f"{self._store.folder}: holds the layers {ranges(self.layers)}, not {ranges(absent)}")

    def check_stages(self) -> None:
        """Raises :class:`UsageError` if no draft stage was converted, with the reason."""
        if self.layers[-1] in self.config.stage_layers:
            return
        if self.config.num_mtp_stages:
            why = "an earlier version of dsv4 left it out; convert the source again"
        else:
            why = "its source has none, or was converted with --layers; convert all of a source that has one"
        raise UsageError(f"{self._store.folder}: no draft stage (mtp or DSpark) to draft tokens with: {why}")

    def read(self, path: str, dtype: np.dtype[Any] = FLOAT32) -> Array:
        """One parameter as the model has it: weights in ``dtype``, norms and the like in float32, integers as int32.

        Raises:
            BadInput: the checkpoint has no such parameter, or its shape or dtype on disk is not the manifest's.
        """
        rule, layer = names.located(self.config, path)
        if rule.per_expert:
            return stacked(self.config.experts_of(layer), lambda expert: self.read_expert(path, expert, dtype))
        return self._decoded(path, rule, None, dtype)

    def token_map(self) -> Array:
        """The mapped id of every token. Raises as :func:`~dsv4_convert.weights.token_map.token_map`."""
        return token_map(self._store.folder, self.config)

    def read_expert(self, path: str, expert: int, dtype: np.dtype[Any] = FLOAT32) -> Array:
        """Matrix ``expert`` of a stack such as ``layers.3.ffn.experts.w1``; reads that expert's bytes only."""
        return self._decoded(path, self.config.names.rule_of(path), expert, dtype)

    def read_rows(self, path: str, rows: Array, dtype: np.dtype[Any] = FLOAT32) -> Array:
        """Some rows of a table that is looked up, such as the embeddings of a prompt's tokens, along its first axis.

        Reads these rows only, each of them once.
        """
        _, width = self.shape(path)
        matrix = self.matrix(path, None)
        distinct, places = np.unique(rows, return_inverse=True)
        found = np.empty((len(distinct), width), dtype)
        for out, row in zip(found, map(int, distinct), strict=True):
            matrix.fill(out[None], (slice(row, row + 1), slice(0, width)))
        return found[places.reshape(np.shape(rows))]

    def read_region(self, path: str, region: Region, dtype: np.dtype[Any] = FLOAT32) -> Array:
        """A part of the result of :meth:`read`: one slice of step 1 for every axis.

        Reads only the bytes of the region (whole tiles if quantised). Memory beside the result: a block of 64 MB.

        Raises:
            BadInput: as :meth:`read`.
        """
        rule = self.config.names.rule_of(path)
        region = bounded(region, self.shape(path))

        def plain(part: Region) -> Array:
            stored = self._store.read_region(path, part)
            return self._expert_numbers(path, stored) if rule.kind is names.Kind.INTEGER else stored

        return assembled(region, rule, dtype, partial(self.matrix, path), plain)

    def read_stored(self, path: str, region: Region) -> tuple[Array, ...]:
        """As :meth:`~dsv4_convert.weights.parameters.StoredParameters.read_stored`. Raises as :meth:`read`."""
        rule = self.config.names.rule_of(path)
        return stored_parts(
            bounded(region, self.shape(path)),
            rule,
            partial(self.matrix, path),
            partial(self._store.read_region, path),
        )

    def _expert_numbers(self, path: str, stored: Array) -> Array:
        """A table of experts as int32, JAX's widest integer by default; numbers that are no experts are refused."""
        experts = self.config.n_routed_experts
        if stored.size and not (stored.min() >= 0 and stored.max() < experts):
            raise BadInput(
                f"{self._store.folder}: {path}: expected experts 0 to {experts - 1}, found numbers from {stored.min()} "
                f"to {stored.max()}; run dsv4 verify, and convert again"
            )
        return stored.astype(np.int32)

    def shape(self, path: str) -> tuple[int, ...]:
        """Shape of a parameter in the model's layout. Raises :class:`BadInput` if it is not stored so."""
        rule = self.config.names.rule_of(path)
        _, layer = names.located(self.config, path)
        expected = stored = rule.target_shape(self.config, layer)
        scaled = f"{path}.scale" in self._store.paths
        leaf = self._store.leaf(f"{path}.weight" if scaled else path)
        if self._storage is Storage.SOURCE:
            *rest, last = rule.source_shape(self.config, layer)
            packed = 2 if scaled and leaf.dtype.kind in "iu" else 1
            stored = (*expected[: rule.per_expert], *rest, last // packed)
        if leaf.shape != stored:
            raise BadInput(f"{self._store.folder}: {path} is stored as {list(leaf.shape)}, expected {list(stored)}")
        return expected

    def matrix(self, path: str, at: int | None) -> StoredMatrix:
        """A matrix as it is stored; of a stack of experts or groups, entry ``at``."""
        rule = self.config.names.rule_of(path)
        published = self._storage is Storage.SOURCE
        scaled = published and f"{path}.scale" in self._store.paths
        of_rows = published and rule.transform is _GROUPED
        first = () if at is None or of_rows else (slice(at, at + 1),)

        def reader(leaf: str) -> ReadPart:
            def read(rows: slice, columns: slice) -> Array:
                array = self._array(leaf)
                # The last tiles may reach beyond the matrix.
                return array.read_region(bounded((*first, rows, columns), array.layout.shape))[(0,) * len(first)]

            return read

        leaf = f"{path}.weight" if scaled else path
        return StoredMatrix(
            read=reader(leaf),
            dtype=self._store.leaf(leaf).dtype,
            scale=reader(f"{path}.scale") if scaled else None,
            block=rule.block(packed=self._store.leaf(leaf).dtype in PACKED_FP4) if scaled else None,
            transposed=published and rule.transform is not names.Transform.NONE,
            first_row=at * self.config.o_lora_rank if of_rows and at is not None else 0,
        )

    def _array(self, leaf: str) -> StoredArray:
        """A stored array; its metadata are read once, as matrices of a stack are read one by one."""
        if leaf not in self._arrays:
            self._arrays[leaf] = self._store.open_leaf(leaf)
        return self._arrays[leaf]

    def damaged(self, path: str) -> bool:
        """Whether the stored bytes of a parameter differ from the hashes in the manifest."""
        leaves = [leaf for leaf in (path, f"{path}.weight", f"{path}.scale") if leaf in self._store.manifest.leaves]
        return bool(verify(self._store, leaves=leaves))

    def check_codes(self) -> None:
        """Raises :class:`UsageError` unless the weights are stored as they were published."""
        if self._storage is not Storage.SOURCE:
            raise UsageError(
                f"{self._store.folder}: its weights are expanded to {self._storage}; to compute from the "
                "published codes, convert the source again with --dtype source"
            )

    def _decoded(self, path: str, rule: names.Rule, expert: int | None, dtype: np.dtype[Any]) -> Array:
        dtype = dtype if rule.kind.follows_dtype else FLOAT32
        published = self._storage is Storage.SOURCE
        scaled = published and f"{path}.scale" in self._store.paths
        stored = self._store.read(f"{path}.weight" if scaled else path, expert)
        if rule.kind is names.Kind.INTEGER:
            return self._expert_numbers(path, stored)
        scale = self._store.read(f"{path}.scale", expert) if scaled else None
        transpose = published and rule.transform is names.Transform.TRANSPOSE
        block = rule.block(packed=stored.dtype in PACKED_FP4) if scaled else None
        decoded = decode_weight(stored, scale, dtype=dtype, block=block, transpose=transpose)
        return grouped(decoded, self.config.o_groups) if published and rule.transform is _GROUPED else decoded
