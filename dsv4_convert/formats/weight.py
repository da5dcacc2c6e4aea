"""Any stored weight to plain numbers: the storage is recognised by the dtype and the scale beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from dsv4_convert.errors import BadInput
from dsv4_convert.formats import cast_plain, decode_fp4, decode_fp8

_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
#: Dtypes in which packed FP4 is stored.
PACKED_FP4 = (np.dtype(np.int8), np.dtype(np.uint8))

#: Bytes that a part of a matrix is decoded by.
_BLOCK_BYTES = 64 << 20

#: Reads rows and columns of a stored matrix: slices with a start and a stop.
ReadPart: TypeAlias = Callable[[slice, slice], np.ndarray[Any, Any]]


def decode_weight(
    stored: np.ndarray[Any, Any],
    scale: np.ndarray[Any, Any] | None,
    *,
    dtype: np.dtype[Any],
    block: tuple[int, int] | None = None,
    transpose: bool = False,
    out: np.ndarray[Any, Any] | None = None,
) -> np.ndarray[Any, Any]:
    """Decode ``[out, in]`` to ``dtype``, optionally as ``[in, out]``.

    With a scale: FP8 (e4m3), of which ``block`` outputs and inputs share one; or FP4 (e2m1, two per byte) in groups of
    32 inputs. Without: BF16 or F32 are converted, integers keep their dtype. ``out`` is filled and returned if given.

    Raises:
        BadInput: a scale beside a dtype that has none, or of the wrong shape.
    """
    if scale is None:
        return cast_plain(stored, dtype=dtype, transpose=transpose, out=out)
    if stored.dtype == _FP8:
        assert block is not None, "FP8 codes are decoded in blocks"
        return decode_fp8(stored, scale, dtype=dtype, block=block, transpose=transpose, out=out)
    if stored.dtype in PACKED_FP4:
        return decode_fp4(stored, scale, dtype=dtype, transpose=transpose, out=out)
    raise BadInput(f"a weight of dtype {stored.dtype} has no scale; expected float8_e4m3fn or packed int8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredMatrix:
    """A stored matrix whose regions are read and decoded.

    Attributes:
        read: reads rows and columns; for packed FP4, columns are bytes.
        dtype: the stored dtype.
        scale: reads the scales; None without scales.
        block: rows and columns that share a scale; None without scales.
        transposed: it is stored as ``[out, in]`` and decoded as ``[in, out]``.
        first_row: stored row at which the matrix begins; a whole number of tiles if there are scales.
    """

    read: ReadPart
    dtype: np.dtype[Any]
    scale: ReadPart | None = None
    block: tuple[int, int] | None = None
    transposed: bool = False
    first_row: int = 0

    def fill(self, out: np.ndarray[Any, Any], region: Sequence[slice]) -> None:
        """Decode a region of the wanted matrix, slices with starts and stops, into ``out``, block by block of rows.

        Reads the tiles concerned only. Memory beside ``out``: a block.

        Raises:
            BadInput: as :func:`decode_weight`.
        """
        rows, columns = reversed(region) if self.transposed else region
        width = (columns.stop - columns.start) * out.dtype.itemsize or 1
        height = 1 if self.block is None else self.block[0]
        step = max(height, _BLOCK_BYTES // width // height * height)
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            to = slice(start - rows.start, stop - rows.start)
            block = self._decoded(slice(self.first_row + start, self.first_row + stop), columns, out.dtype)
            out[(slice(None), to) if self.transposed else to] = block

    def stored(self, region: Sequence[slice]) -> tuple[np.ndarray[Any, Any], ...]:
        """Codes and, where there are some, scales of the whole tiles that a region of the wanted matrix lies in.

        Their axes are those of the wanted matrix; nothing is decoded.
        """
        rows, columns = reversed(region) if self.transposed else region
        parts, _ = self._tiles(slice(self.first_row + rows.start, self.first_row + rows.stop), columns)
        return tuple(part.T if self.transposed else part for part in parts)

    def _decoded(self, rows: slice, columns: slice, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        parts, wanted = self._tiles(rows, columns)
        scale = parts[1] if len(parts) > 1 else None
        decoded = decode_weight(parts[0], scale, dtype=dtype, block=self.block, transpose=self.transposed)
        return decoded[wanted[::-1] if self.transposed else wanted]

    def _tiles(self, rows: slice, columns: slice) -> tuple[tuple[np.ndarray[Any, Any], ...], tuple[slice, slice]]:
        """The stored tiles that hold a part of the matrix, and where the part is in them."""
        if self.scale is None or self.block is None:
            return (self.read(rows, columns),), (slice(None), slice(None))
        tile, packed = self.block, 1 if self.dtype == _FP8 else 2
        tiles = [slice(part.start // n, -(-part.stop // n)) for part, n in zip((rows, columns), tile, strict=True)]
        down, along = (slice(part.start * n, part.stop * n) for part, n in zip(tiles, tile, strict=True))
        codes = self.read(down, slice(along.start // packed, along.stop // packed))
        wanted = (
            slice(rows.start - down.start, rows.stop - down.start),
            slice(columns.start - along.start, columns.stop - along.start),
        )
        return (codes, self.scale(*tiles)), wanted
