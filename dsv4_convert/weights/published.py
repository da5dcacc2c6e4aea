"""Model parameters read and decoded directly from a Hugging Face checkpoint, without a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_convert.checkpoint import Checkpoint
from dsv4_convert.checkpoint.header import stored_forms
from dsv4_convert.checkpoint.locate import open_source
from dsv4_convert.checkpoint.weights import read_expert, read_table, read_weight, release
from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.formats.weight import ReadPart, StoredMatrix, decode_weight
from dsv4_convert.spec.coverage import Leaf, resolve
from dsv4_convert.spec.names import Kind, Transform, check_layers
from dsv4_convert.store.layout import Region, bounded
from dsv4_convert.weights.parameters import assembled, grouped, stacked, stored_parts
from dsv4_convert.weights.token_map import token_map

Array = np.ndarray[Any, Any]
_FLOAT32 = np.dtype(np.float32)


class PublishedWeights:
    """Reads the same values as :class:`dsv4_convert.weights.converted.Weights`, from the published shards."""

    def __init__(self, checkpoint: Checkpoint, *, layers: tuple[int, ...] | None = None) -> None:
        """Prove that the checkpoint fills ``layers`` (None: all, and its mtp stages); no weight is read.

        Raises:
            BadInput: it does not, or is not a DeepSeek-V4 text model.
        """
        self._checkpoint = checkpoint
        config = checkpoint.architecture()
        resolution = resolve(stored_forms(checkpoint.tensors), config, layers=layers, where=str(checkpoint.root))
        self.config = resolution.config
        self.layers = (*check_layers(config, layers), *self.config.stage_layers)
        self._leaves = {leaf.path: leaf for leaf in resolution.leaves}
        self._dialect = resolution.dialect

    @classmethod
    def open(cls, source: Path | str, *, layers: tuple[int, ...] | None = None) -> PublishedWeights:
        """Open what :func:`~dsv4_convert.checkpoint.locate.open_source` opens.

        Raises as that does, and :class:`BadInput` if it does not fill ``layers``.
        """
        return cls(open_source(source, layers=layers), layers=layers)

    def prefetch(self) -> None:
        """As :meth:`dsv4_convert.checkpoint.Checkpoint.prefetch`."""
        self._checkpoint.prefetch()

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Facts about the weights for reports."""
        return {
            "source": self._checkpoint.repository or str(self._checkpoint.root),
            "storage": "published",
            "dialect": self._dialect,
        }

    @property
    def paths(self) -> tuple[str, ...]:
        """The parameters of the opened layers, in the model's order."""
        return tuple(self._leaves)

    def shape(self, path: str) -> tuple[int, ...]:
        """Shape of a parameter in the model's layout."""
        return self._leaf(path).target_shape

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of these weights, as JSON; no weight is read."""
        checkpoint = self._checkpoint
        return {
            "source": checkpoint.repository or str(checkpoint.root.resolve()),
            "revision": checkpoint.revision,
            "shards": dict(checkpoint.sizes),
            # A commit says more than times do, where it is known.
            "changed": None if checkpoint.revision is not None else dict(checkpoint.changed()),
        }

    def check_layers(self, wanted: tuple[int, ...]) -> None:
        """Raises :class:`UsageError` for layers that were not opened."""
        absent = sorted(set(wanted) - set(self.layers))
        if absent:
            raise UsageError(f"{self._checkpoint.root}: opened without the layers {absent}")

    def check_stages(self) -> None:
        """Raises :class:`UsageError` if no draft stage was opened."""
        if not self.config.num_mtp_stages:
            raise UsageError(f"{self._checkpoint.root}: no draft stage, or opened without it")

    def token_map(self) -> Array:
        """The mapped id of every token. Raises as :func:`~dsv4_convert.weights.token_map.token_map`."""
        return token_map(self._checkpoint.root, self.config)

    def read(self, path: str, dtype: np.dtype[Any] = _FLOAT32) -> Array:
        """One parameter in the model's layout: weights in ``dtype``, norms and the like float32, integers int32."""
        leaf = self._leaf(path)
        if leaf.rule.per_expert:
            return stacked(self.config.experts_of(leaf.layer), lambda expert: self.read_expert(path, expert, dtype))
        (source,) = leaf.sources
        if leaf.rule.kind is Kind.INTEGER:
            return read_table(self._checkpoint, source.weight, self.config.n_routed_experts).astype(np.int32)
        dtype = dtype if leaf.rule.kind.follows_dtype else _FLOAT32
        transpose = leaf.rule.transform is Transform.TRANSPOSE
        decoded = read_weight(self._checkpoint, source, dtype=dtype, transpose=transpose)
        self._release(leaf)
        return grouped(decoded, self.config.o_groups) if leaf.rule.transform is Transform.GROUPED else decoded

    def read_expert(self, path: str, expert: int, dtype: np.dtype[Any] = _FLOAT32) -> Array:
        """Matrix ``expert`` of a stack; reads that expert's bytes only."""
        return read_expert(self._checkpoint, self._leaf(path), expert, dtype=dtype, transpose=True)

    def read_rows(self, path: str, rows: Array, dtype: np.dtype[Any] = _FLOAT32) -> Array:
        """Some rows of a table that is looked up, along its first axis; reads their pages only."""
        leaf = self._leaf(path)
        (source,) = leaf.sources
        distinct, places = np.unique(rows, return_inverse=True)
        stored = self._checkpoint.read(source.weight)[distinct]
        scale = None
        if source.scale is not None and source.block is not None:
            assert source.block[0] == 1, f"rows of {path} share their scales"
            scale = self._checkpoint.read(source.scale)[distinct]
        self._release(leaf)
        return decode_weight(stored, scale, dtype=dtype, block=source.block)[places.reshape(np.shape(rows))]

    def read_region(self, path: str, region: Region, dtype: np.dtype[Any] = _FLOAT32) -> Array:
        """A part of the result of :meth:`read`: one slice of step 1 for every axis. Reads only its pages."""
        leaf = self._leaf(path)
        region = bounded(region, leaf.target_shape)
        weight = leaf.sources[0].weight
        part = assembled(
            region, leaf.rule, dtype, partial(self.matrix, path), lambda at: self._checkpoint.read(weight)[at]
        )
        self._release(leaf)
        return part

    def read_stored(self, path: str, region: Region) -> tuple[Array, ...]:
        """As :meth:`~dsv4_convert.weights.parameters.StoredParameters.read_stored`."""
        leaf = self._leaf(path)
        weight = leaf.sources[0].weight
        return stored_parts(
            bounded(region, leaf.target_shape),
            leaf.rule,
            partial(self.matrix, path),
            lambda at: self._checkpoint.read(weight)[at],
        )

    def matrix(self, path: str, at: int | None) -> StoredMatrix:
        """A matrix as it is stored; of a stack of experts or groups, entry ``at``."""
        leaf = self._leaf(path)
        of_rows = leaf.rule.transform is Transform.GROUPED
        source = leaf.sources[0 if at is None or of_rows or leaf.fused else at]
        first_row = at * self.config.o_lora_rank if of_rows and at is not None else 0
        entry: tuple[Any, ...] = ()
        if leaf.fused:
            assert at is not None
            entry, first_row = (at,), (leaf.rule.half or 0) * leaf.source_shape[0]

        def reader(name: str) -> ReadPart:
            def read(rows: slice, columns: slice) -> Array:
                part = np.array(self._checkpoint.read(name)[(*entry, rows, columns)])
                self._checkpoint.release(name)
                return part

            return read

        return StoredMatrix(
            read=reader(source.weight),
            dtype=self._checkpoint.read(source.weight).dtype,
            scale=None if source.scale is None else reader(source.scale),
            block=source.block,
            transposed=leaf.rule.transform is not Transform.NONE,
            first_row=first_row,
        )

    def damaged(self, path: str) -> bool:
        """Always False: the published bytes are the reference for everything else."""
        return False

    def tensor(self, path: str, expert: int | None = None) -> str:
        """Name of the tensor that fills a parameter, or one expert of a stack."""
        leaf = self._leaf(path)
        return leaf.sources[0 if expert is None or leaf.fused else expert].weight

    def alike(self, path: str) -> list[str]:
        """Paths of the other parameters of the same layer, or of the model level, that have the same shape."""
        leaf = self._leaf(path)
        return [
            other.path
            for other in self._leaves.values()
            if other.layer == leaf.layer and other.source_shape == leaf.source_shape and other is not leaf
        ]

    def _leaf(self, path: str) -> Leaf:
        leaf = self._leaves.get(path)
        if leaf is None:
            raise BadInput(f"{self._checkpoint.root}: nothing fills {path}")
        return leaf

    def _release(self, leaf: Leaf) -> None:
        """Give the mapped pages back to the system."""
        for source in leaf.sources:
            release(self._checkpoint, source)
