"""The grouped product of routed experts whose stacks stay codes: a Pallas kernel for TPUs.

One tile of an expert's matrix is decoded in the core's own memory, and multiplied with all rows of that expert. So no
decoded matrix is ever in the device's memory, and each code of a chosen expert is read once.

Shape letters: ``R`` rows, ``E`` experts, ``I`` inputs and ``O`` outputs of a matrix, ``V`` visits.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from dsv4_convert.model.encoded import Encoded, factors, numbers
from dsv4_convert.model.ops import precision

#: Rows of a tile of rows; outputs of a matrix's tile at most, and the bytes that it may take decoded.
_ROWS, _OUTPUTS, _BYTES = 128, 512, 2**22
#: Numbers that are decoded at a time: inputs, and outputs, which are the lanes of a register.
_PIECE, _LANES = 256, 128


class Tiles(NamedTuple):
    """The size of the kernel's tiles: ``rows`` of a tile of rows, ``outputs`` of a tile of a matrix."""

    rows: int
    outputs: int


class Visits(NamedTuple):
    """The pairs of an expert and a tile of rows that have rows in common, in the order of the rows.

    ``there`` of them exist, at least one; ``bounds`` are the first row of every expert and the end of the last one.
    """

    expert: Int[Array, " V"]
    tile: Int[Array, " V"]
    bounds: Int[Array, " E+1"]
    there: Int[Array, ""]


def ragged_dot_codes(
    rows: Float[Array, "R I"], stack: Encoded, sizes: Int[Array, " E"], tiles: Tiles | None = None
) -> Float[Array, "R O"]:
    """Multiply rows, sorted by expert, each with its expert's matrix, in float32; the result has the rows' dtype.

    Equal to ``lax.ragged_dot`` with the decoded stack, except that rows beyond the sum of ``sizes`` are undefined. On
    other platforms than TPUs, Pallas interprets the kernel, which is right and slow.

    Args:
        rows, stack: the operands.
        sizes: number of rows of every expert.
        tiles: another size of tiles than the largest that the core has room for.
    """
    inputs, outputs = stack.shape[1:]
    tiles = tiles or _tiles(len(rows), inputs, outputs, max(rows.dtype.itemsize, stack.dtype.itemsize))
    codes, scales, (block, width) = stack.codes, stack.scales, stack.block
    if short := -inputs % block:  # in every release the last blocks are whole
        rows = jnp.pad(rows, ((0, 0), (0, short)))
        codes = jnp.pad(codes, ((0, 0), (0, short // (1 + stack.packed)), (0, 0)))
    if width > 1:
        scales = jnp.repeat(scales, width, axis=2)[..., :outputs]
    stack = dataclasses.replace(stack, codes=codes, scales=scales, block=(block, 1))
    visits = _visits(sizes, len(rows), tiles.rows)
    on_tpu, elsewhere = (partial(_run, tiles=tiles, interpret=interpret) for interpret in (False, True))
    return lax.platform_dependent(rows, stack, visits, tpu=on_tpu, default=elsewhere)


def _tiles(rows: int, inputs: int, outputs: int, itemsize: int) -> Tiles:
    """The largest tiles for a product of ``rows`` with matrices ``[inputs, outputs]`` that the core has room for."""
    if outputs <= _LANES:
        return Tiles(min(_ROWS, rows), outputs)
    # A product of float32 takes three bfloat16 parts of its operands besides.
    each = itemsize if itemsize < 4 else itemsize + 6
    most = min(_BYTES // (inputs * each), _OUTPUTS, outputs)
    return Tiles(min(_ROWS, rows), max(most // _LANES, 1) * _LANES)


def _visits(sizes: Int[Array, " E"], rows: int, tile_rows: int) -> Visits:
    """The visits for experts with ``sizes`` rows each, of ``rows`` in all."""
    bounds = jnp.cumulative_sum(sizes, include_initial=True).astype(jnp.int32)
    first = bounds[:-1] // tile_rows
    tiles = jnp.where(sizes > 0, pl.cdiv(bounds[1:], tile_rows) - first, 0)
    ends = jnp.cumulative_sum(tiles)
    visit = jnp.arange(pl.cdiv(rows, tile_rows) + len(sizes), dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(ends, visit, side="right"), len(sizes) - 1).astype(jnp.int32)
    tile = first[expert] + visit - (ends - tiles)[expert]
    return Visits(expert, tile, bounds, jnp.maximum(ends[-1], 1))


def _run(rows: Array, stack: Encoded, visits: Visits, *, tiles: Tiles, interpret: bool) -> Array:
    """The kernel over all tiles of the matrices' outputs, and for each over the visits."""
    inputs, outputs = stack.shape[1:]

    def kernel(expert: Any, tile: Any, bounds: Any, rows: Any, codes: Any, scales: Any, out: Any, *room: Any) -> None:
        visit = pl.program_id(1)
        own = expert[visit]
        matrix, _ = room

        @pl.when((visit == 0) | (own != expert[jnp.maximum(visit - 1, 0)]))
        def decode_anew() -> None:
            _decode(stack, codes, scales, *room)

        operands = rows[...], matrix[...].astype(rows.dtype)
        product = jnp.dot(*operands, precision=precision(*operands), preferred_element_type=jnp.float32)
        row = tile[visit] * tiles.rows + lax.broadcasted_iota(jnp.int32, product.shape, 0)
        here = (row >= bounds[own]) & (row < bounds[own + 1])
        # The other rows of the tile belong to experts before, whose visits were the last ones, or after.
        out[...] = jnp.where(here, product, out[...].astype(jnp.float32)).astype(out.dtype)

    def of_rows(part: Any, visit: Any, expert: Any, tile: Any, bounds: Any) -> tuple[Any, ...]:
        return tile[visit], 0

    def of_stack(part: Any, visit: Any, expert: Any, tile: Any, bounds: Any) -> tuple[Any, ...]:
        return expert[visit], 0, part

    def of_out(part: Any, visit: Any, expert: Any, tile: Any, bounds: Any) -> tuple[Any, ...]:
        return tile[visit], part

    parts = pl.cdiv(outputs, tiles.outputs)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(parts, visits.there),
        in_specs=[
            pl.BlockSpec((tiles.rows, inputs), of_rows),
            pl.BlockSpec((None, stack.codes.shape[1], tiles.outputs), of_stack),
            pl.BlockSpec((None, stack.scales.shape[1], tiles.outputs), of_stack),
        ],
        out_specs=pl.BlockSpec((tiles.rows, tiles.outputs), of_out),
        scratch_shapes=[
            pltpu.VMEM((inputs, tiles.outputs), stack.dtype),
            pltpu.VMEM((max(_PIECE, stack.block[0]), min(_LANES, tiles.outputs)), jnp.float32),
        ],
    )
    run = pl.pallas_call(
        kernel,
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((len(rows), outputs), rows.dtype),
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        # At most: all experts are chosen, and rows are read for each tile of outputs.
        cost_estimate=pl.CostEstimate(
            flops=2 * rows.size * outputs,
            bytes_accessed=stack.codes.nbytes + stack.scales.nbytes + parts * rows.nbytes + len(rows) * outputs * 4,
            transcendentals=0,
        ),
    )
    result: Array = run(*visits[:3], rows, stack.codes, stack.scales)
    return result


def _decode(stack: Encoded, codes: Any, scales: Any, matrix: Any, piece: Any) -> None:
    """Decode a tile of a matrix piece by piece: ``piece`` has the even and odd inputs of packed FP4 in turn."""
    block, lanes, ratio = stack.block[0], piece.shape[1], 1 + stack.packed
    blocks, at_once = scales.shape[0], max(_PIECE // block, 1)

    def column(at: Array, _: None) -> None:
        columns = pl.ds(pl.multiple_of(at * lanes, lanes), lanes)
        for first in range(0, blocks, at_once):
            last = min(first + at_once, blocks)
            start, end = first * block, last * block
            scale = factors(scales[first:last, columns])
            for half, values in enumerate(numbers(codes[start // ratio : end // ratio, columns], packed=stack.packed)):
                for factor in scale:
                    values = (values.reshape(last - first, -1, lanes) * factor[:, None, :]).reshape(values.shape)
                piece[pl.ds(half, len(values), stride=ratio), :] = values
            matrix[start:end, columns] = piece[: end - start, :].astype(matrix.dtype)

    lax.fori_loop(0, matrix.shape[1] // lanes, column, None)
