"""Published codes and scales of a parameter in the model's layout, whole or by regions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np

from dsv4_convert.formats import cast_plain
from dsv4_convert.formats.weight import PACKED_FP4, StoredMatrix
from dsv4_convert.spec.names import Kind
from dsv4_convert.store.layout import Region, bounded
from dsv4_convert.weights.parameters import Array, Parameters

#: The two arrays of an encoded parameter.
Part: TypeAlias = Literal["codes", "scales"]
PARTS: tuple[Part, Part] = ("codes", "scales")


@dataclasses.dataclass(frozen=True)
class Codes:
    """A quantised parameter as :class:`~dsv4_convert.model.encoded.Encoded` holds it, on the disk.

    Attributes:
        shape: of the decoded parameter.
        block, packed: as of ``Encoded``.
        scale_dtype: uint8 or float32.
        matrix: the stored parameter; of a stack, one entry.
    """

    shape: tuple[int, ...]
    block: tuple[int, int]
    packed: bool
    scale_dtype: np.dtype[np.generic]
    matrix: Callable[[int | None], StoredMatrix]

    @classmethod
    def of(cls, weights: Parameters, path: str, shape: tuple[int, ...]) -> Codes | None:
        """Codes of a parameter whose decoded ``shape`` is given; None if it is not quantised."""
        from dsv4_convert.model.encoded import block_of

        rule = weights.config.names.rule_of(path)
        if rule.kind not in (Kind.LINEAR, Kind.EXPERT):
            return None

        def matrix(at: int | None) -> StoredMatrix:
            return weights.matrix(path, at)

        first = matrix(0 if len(shape) > 2 else None)
        if first.scale is None:
            return None
        packed = first.dtype in PACKED_FP4
        block = block_of(rule, packed=packed, outputs=shape[-1])
        stored = first.scale(slice(0, 1), slice(0, 1)).dtype
        return cls(shape, block, packed, stored if stored.itemsize > 1 else np.dtype(np.uint8), matrix)

    def shape_of(self, part: Part) -> tuple[int, ...]:
        """Shape of one of the two arrays."""
        *stack, inputs, outputs = self.shape
        if part == "codes":
            return (*stack, inputs // (1 + self.packed), outputs)
        return (*stack, -(-inputs // self.block[0]), -(-outputs // self.block[1]))

    def dtype_of(self, part: Part) -> np.dtype[np.generic]:
        """Dtype of one of the two arrays."""
        return np.dtype(np.uint8) if part == "codes" else self.scale_dtype

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return sum(int(np.prod(self.shape_of(part))) * self.dtype_of(part).itemsize for part in PARTS)

    def read(self, part: Part, region: Region | None = None) -> Array:
        """One of the two arrays, or a region of it: one slice of step 1 for every axis. Reads only what it needs."""
        shape = self.shape_of(part)
        *stack, rows, columns = bounded(region or (slice(None),) * len(shape), shape)
        if not stack:
            return self._read(part, None, rows, columns)
        return np.stack([self._read(part, at, rows, columns) for at in range(stack[0].start, stack[0].stop)])

    def read_entry(self, part: Part, at: int) -> Array:
        """One of the two arrays of entry ``at`` of a stack."""
        _, rows, columns = self.shape_of(part)
        return self._read(part, at, slice(0, rows), slice(0, columns))

    def _read(self, part: Part, at: int | None, rows: slice, columns: slice) -> Array:
        """Rows and columns of the model's layout; the stored one is ``[out, in]`` where that is transposed."""
        matrix = self.matrix(at)
        if not matrix.transposed:
            read = matrix.read if part == "codes" else matrix.scale
            assert read is not None
            stored = read(rows, columns)
        elif part == "codes":
            first = matrix.first_row
            stored = matrix.read(slice(first + columns.start, first + columns.stop), rows)
        else:
            assert matrix.scale is not None
            assert matrix.block is not None
            # Groups narrower than a block each get a copy of its scale.
            wanted = (matrix.first_row + np.arange(columns.start, columns.stop) * self.block[1]) // matrix.block[0]
            lowest = int(wanted[0]) if len(wanted) else 0
            stored = matrix.scale(slice(lowest, int(wanted[-1]) + 1 if len(wanted) else 0), rows)[wanted - lowest]
        stored = np.ascontiguousarray(stored.view(np.uint8) if stored.dtype.itemsize == 1 else stored)
        return cast_plain(stored, dtype=stored.dtype, transpose=matrix.transposed)
