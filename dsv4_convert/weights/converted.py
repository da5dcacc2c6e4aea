"""Parameters out of an Orbax checkpoint that dsv4 wrote, whatever its storage."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.folders import PathLike
from dsv4_convert.formats.weight import ReadPart, StoredMatrix, decode_weight
from dsv4_convert.show.units import ranges
from dsv4_convert.spec import names
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.conversion import Layout, Storage
from dsv4_convert.store import Store, open_store, verify
from dsv4_convert.store.layout import Region, bounded
from dsv4_convert.weights.parameters import FLOAT32, Array, assembled, grouped

_GROUPED = names.Transform.GROUPED


class Weights:
    """Reads single parameters, or single experts of one, in the model's layout. Nothing is held in memory.

    Examples:
        >>> weights = Weights.open(Path("orbax"))
        >>> weights.read_expert("layers.1.ffn.experts.w1", 3).shape  # [in, out]
        (32, 32)
    """

    def __init__(self, store: Store) -> None:
        self._store = store
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
        """The layers that were converted."""
        return self._store.conversion.layers

    def check_layers(self, wanted: tuple[int, ...]) -> None:
        """Raises :class:`UsageError` for layers that this checkpoint does not hold."""
        absent = [layer for layer in wanted if layer not in self.layers]
        if absent:
            raise UsageError(f"{self._store.folder}: holds the layers {ranges(self.layers)}, not {ranges(absent)}")

    def check_stages(self) -> None:
        """Raises :class:`UsageError` if no mtp stage was converted, with the reason."""
        if any(names.stage_of(path) is not None for path in self._store.paths):
            return
        if names.DSPARK in self._store.conversion.dropped:
            why = "its source has no mtp stage, but DSpark's draft stages, which dsv4 does not convert"
        elif self.config.num_mtp_stages:
            why = "an earlier version of dsv4 left it out; convert the source again"
        else:
            why = "its source has none, or was converted with --layers; convert all of a source that has one"
        raise UsageError(f"{self._store.folder}: no mtp stage to draft tokens with: {why}")

    def read(self, path: str, dtype: np.dtype[Any] = FLOAT32) -> Array:
        """One parameter as the model has it: weights in ``dtype``, norms and the like in float32, integers as int32.

        Raises:
            BadInput: the checkpoint has no such parameter, or its shape or dtype on disk is not the manifest's.
        """
        rule = names.rule_of(path)
        if rule.per_expert:
            stack = [self.read_expert(path, expert, dtype) for expert in range(self.config.n_routed_experts)]
            return np.stack(stack)
        return self._decoded(path, rule, None, dtype)

    def read_expert(self, path: str, expert: int, dtype: np.dtype[Any] = FLOAT32) -> Array:
        """Matrix ``expert`` of a stack such as ``layers.3.ffn.experts.w1``; reads that expert's bytes only."""
        return self._decoded(path, names.rule_of(path), expert, dtype)

    def read_rows(self, path: str, rows: Array, dtype: np.dtype[Any] = FLOAT32) -> Array:
        """Some rows of an unquantised parameter along its first axis, such as the embeddings of a prompt's tokens."""
        return np.stack(
            [decode_weight(self._store.read(path, slice(row, row + 1)), None, dtype=dtype)[0] for row in map(int, rows)]
        )

    def read_region(self, path: str, region: Region, dtype: np.dtype[Any] = FLOAT32) -> Array:
        """A part of the result of :meth:`read`: one slice of step 1 for every axis.

        Reads only the bytes of the region (whole tiles if quantised). Memory beside the result: a block of 64 MB.

        Raises:
            BadInput: as :meth:`read`.
        """
        rule = names.rule_of(path)
        region = bounded(region, self._shape(path, rule))

        def plain(part: Region) -> Array:
            stored = self._store.read_region(path, part)
            return self._expert_numbers(path, stored) if rule.kind is names.Kind.INTEGER else stored

        return assembled(region, rule, dtype, partial(self.matrix, path), plain)

    def _expert_numbers(self, path: str, stored: Array) -> Array:
        """A table of experts as int32, JAX's widest integer by default; numbers that are no experts are refused."""
        experts = self.config.n_routed_experts
        if stored.size and not (stored.min() >= 0 and stored.max() < experts):
            raise BadInput(
                f"{self._store.folder}: {path}: expected experts 0 to {experts - 1}, found numbers from {stored.min()} "
                f"to {stored.max()}; run dsv4 verify, and convert again"
            )
        return stored.astype(np.int32)

    def _shape(self, path: str, rule: names.Rule) -> tuple[int, ...]:
        """Shape of a parameter. Raises :class:`BadInput` if it is not stored so."""
        stage = names.stage_of(path)
        layer = names.layer_of(path) if stage is None else self.config.num_hidden_layers + stage
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
        rule = names.rule_of(path)
        published = self._storage is Storage.SOURCE
        scaled = published and f"{path}.scale" in self._store.paths
        of_rows = published and rule.transform is _GROUPED
        first = () if at is None or of_rows else (slice(at, at + 1),)

        def reader(leaf: str) -> ReadPart:
            return lambda rows, columns: self._store.read_region(leaf, (*first, rows, columns))[(0,) * len(first)]

        leaf = f"{path}.weight" if scaled else path
        return StoredMatrix(
            read=reader(leaf),
            dtype=self._store.leaf(leaf).dtype,
            scale=reader(f"{path}.scale") if scaled else None,
            transposed=published and rule.transform is not names.Transform.NONE,
            first_row=at * self.config.o_lora_rank if of_rows and at is not None else 0,
        )

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
        decoded = decode_weight(stored, scale, dtype=dtype, transpose=transpose)
        return grouped(decoded, self.config.o_groups) if published and rule.transform is _GROUPED else decoded
