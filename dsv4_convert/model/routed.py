"""Each token through the experts that it was routed to, as functions: grouped on accelerators, packed on CPU.

Shape letters: ``M`` tokens, ``D`` width, ``I`` inner width, ``E`` experts, ``K`` experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv4_convert.model.encoded import Encoded
from dsv4_convert.model.mlp import swiglu, weighted
from dsv4_convert.model.numerics import PLAIN, Numerics
from dsv4_convert.model.parameters import precision

#: Rows that accelerators take at a time: enough that reading the experts' matrices again costs little beside products.
_ROWS = 8192
#: Rows that are taken at a time where the way goes from expert to expert: large and small tiles.
CPU_TILES, ACCELERATOR_TILES = (128, 16), (256, 32)
#: What reading an expert's matrices for a product, and copying them before, cost there: as the number of rows whose
#: product takes as long.
_READ, _COPY = 24, 28


def grouped(
    x: Float[Array, "M D"],
    experts: Int[Array, "M K"],
    weights: Float[Array, "M K"],
    w1: Float[Array, "E D I"],
    w2: Float[Array, "E I D"],
    w3: Float[Array, "E D I"],
    *,
    limit: float,
    numerics: Numerics = PLAIN,
) -> Float[Array, "M D"]:
    """The chosen experts' outputs, each times its weight, summed in float32; experts outside of the stack add nothing.

    Rows sorted by expert, then one ragged matmul per matrix over all experts; a few thousand rows at a time, as many
    times as there are rows, so that memory has a bound whatever the routing, and no row is left out.
    """
    tokens, chosen = experts.shape
    order, sizes = _by_expert(experts, w1.shape[0])
    ends = jnp.cumulative_sum(sizes)
    x = numerics.input(x)

    def add(first: Array | int, total: Array, tile: int) -> Array:
        """Add the outputs of the rows from ``first`` on."""
        row = first + jnp.arange(tile)
        pick = order[jnp.minimum(row, tokens * chosen - 1)]
        share = weights.reshape(-1)[pick][:, None]
        here = jnp.clip(ends, first, first + tile) - jnp.clip(ends - sizes, first, first + tile)
        rows = x[pick // chosen]
        gate, up = (numerics.wide(_ragged(rows, stack, here, numerics)) for stack in (w1, w3))
        inner = swiglu(gate, up, limit)
        if numerics.release:
            inner *= share
        output = _ragged(numerics.input(inner.astype(x.dtype)), w2, here, numerics).astype(jnp.float32)
        if not numerics.release:
            output *= share
        return total.at[jnp.where(row < ends[-1], pick // chosen, tokens)].add(output, mode="drop")

    total = jnp.zeros(x.shape, jnp.float32)
    if tokens * chosen <= _ROWS:
        return add(0, total, tokens * chosen)

    def body(state: tuple[Array, Array]) -> tuple[Array, Array]:
        first, total = state
        return first + _ROWS, add(first, total, _ROWS)

    return lax.while_loop(lambda state: state[0] < ends[-1], body, (jnp.zeros_like(ends[-1]), total))[1]


def _ragged(
    rows: Float[Array, "R inner"], stack: Float[Array, "E inner outer"], sizes: Int[Array, " E"], numerics: Numerics
) -> Float[Array, "R outer"]:
    """Rows by expert, each times its expert's matrix."""
    dtype = stack.dtype if numerics.quantized else rows.dtype
    operands = (rows.astype(dtype), stack.astype(dtype))
    product = lax.ragged_dot(*operands, sizes, precision=precision(*operands), preferred_element_type=jnp.float32)
    return product.astype(rows.dtype)


def packed(
    x: Float[Array, "M D"],
    experts: Int[Array, "M K"],
    weights: Float[Array, "M K"],
    w1: Float[Array | Encoded, "E D I"],
    w2: Float[Array | Encoded, "E I D"],
    w3: Float[Array | Encoded, "E D I"],
    *,
    limit: float,
    numerics: Numerics = PLAIN,
    tiles: tuple[int, int] = CPU_TILES,
) -> Float[Array, "M D"]:
    """The same sum as :func:`grouped`: first an equal number of rows of every expert, then the rest tile by tile.

    XLA on CPU copies a matrix out of a stack before it multiplies with it, which takes as long as a product of some
    rows (``benchmarks/xla_limits.py``). One batched product over the whole stack copies nothing, but takes equally many
    rows of every expert. How many is decided by the routing as it is: all where experts have about as many tokens each,
    none where most experts have none, as in decoding. The rest goes through a loop over the tiles that exist, in which
    an expert that has no rows left is not read. All shapes are fixed; only what runs depends on the routing.

    Of encoded stacks none is taken at once, and the loop decodes the one expert that it multiplies with: no more than
    that is ever in memory as numbers.
    """
    tokens, chosen = experts.shape
    stack = w1.shape[0]
    order, sizes = _by_expert(experts, stack)
    first_row = jnp.cumulative_sum(sizes, include_initial=True)
    flat_weights = weights.reshape(-1)

    def add(total: Array, row: Array, end: Array, run: Callable[[Array, Array], Array]) -> Array:
        """Add what ``run`` makes of the tokens of some rows; those from ``end`` on are cut off."""
        pick = order[jnp.minimum(row, tokens * chosen - 1)]
        output = run(x[pick // chosen], flat_weights[pick])
        return total.at[jnp.where(row < end, pick // chosen, tokens)].add(output)

    def at_once(amount: int) -> Callable[[Array], Array]:
        row = first_row[:-1, None] + jnp.arange(amount)

        def one(rows: Array, share: Array, w1: Array, w2: Array, w3: Array) -> Array:
            return weighted(rows, share, w1, w2, w3, limit, numerics)

        every: Callable[..., Array] = jax.vmap(one)

        def run(rows: Array, share: Array) -> Array:
            count = _pieces(amount, stack)
            pieces = zip(jnp.split(rows, count, axis=1), jnp.split(share, count, axis=1), strict=True)
            return jnp.concatenate([every(*piece, w1, w2, w3) for piece in pieces], axis=1)

        return lambda total: add(total, row, first_row[1:, None], run)

    def tile_by_tile(total: Array, next_row: Array, count: Array, tile: int) -> Array:
        """``count`` tiles of each expert, from its ``next_row`` on."""
        first_tile = jnp.cumulative_sum(count, include_initial=True)

        def body(state: tuple[Array, Array]) -> tuple[Array, Array]:
            index, total = state
            expert = jnp.searchsorted(first_tile, index, side="right") - 1
            row = next_row[expert] + (index - first_tile[expert]) * tile + jnp.arange(tile)

            def run(rows: Array, share: Array) -> Array:
                return weighted(rows, share, w1[expert], w2[expert], w3[expert], limit, numerics)

            return index + 1, add(total, row, first_row[expert + 1], run)

        start = jnp.zeros((), first_tile.dtype)
        return lax.while_loop(lambda state: state[0] < first_tile[stack], body, (start, total))[1]

    amounts = (0,) if isinstance(w1, Encoded) else _amounts(tokens * chosen, stack)
    large, small = zip(*(_tiles(jnp.maximum(sizes - amount, 0), *tiles) for amount in amounts), strict=True)
    costs = jnp.array([stack * (amount + _pieces(amount, stack) * _READ) for amount in amounts])
    for counts, tile in zip((large, small), tiles, strict=True):
        costs += jnp.sum(jnp.stack(counts), axis=1) * (tile + _READ + _COPY)
    best = jnp.argmin(costs)

    total = jnp.zeros((tokens + 1, x.shape[1]), jnp.float32)
    total = lax.switch(best, [at_once(amount) if amount else lambda total: total for amount in amounts], total)
    next_row = first_row[:-1] + jnp.array(amounts)[best]
    for counts, tile in zip((large, small), tiles, strict=True):
        count = jnp.stack(counts)[best]
        total = tile_by_tile(total, next_row, count, tile)
        next_row += count * tile
    return total[:tokens]


def _amounts(rows: int, stack: int) -> tuple[int, ...]:
    """How many rows of every expert may be taken at once, for ``rows`` in all; 0 is one of them.

    With an even routing nearly no expert has more than two standard deviations above the mean. Fewer are better with an
    uneven one.
    """
    mean = rows / stack
    most = mean + 2 * math.sqrt(mean)
    return (0, *sorted({8 * math.ceil(part * most / 8) for part in (0.25, 0.75, 1)}))


def _tiles(left: Int[Array, " E"], large: int, small: int) -> tuple[Int[Array, " E"], Int[Array, " E"]]:
    """Large and small tiles that hold so many rows of each expert; what two small tiles hold is not worth a large."""
    first = jnp.maximum(left + large - 2 * small - 1, 0) // large
    return first, -(-jnp.maximum(left - first * large, 0) // small)


def _pieces(rows: int, stack: int) -> int:
    """In how many pieces to take ``rows`` rows of each of ``stack`` experts; none of 0 rows.

    From 56 rows and 32 matrices on, XLA on CPU packs every matrix anew before it multiplies, which only many rows are
    worth (``benchmarks/xla_limits.py``).
    """
    if stack < 32 or not 48 < rows <= 144:
        return min(rows, 1)
    return next(count for count in range(2, rows + 1) if rows % count == 0 and rows // count <= 48)


def _by_expert(experts: Int[Array, "M K"], stack: int) -> tuple[Int[Array, " MK"], Int[Array, " E"]]:
    """Order of the M*K choices by expert (stable), and how many each has; those of other experts come last."""
    flat = experts.reshape(-1)
    flat = jnp.where((flat < 0) | (flat >= stack), stack, flat)
    sizes, bits = jnp.bincount(flat, length=stack), (len(flat) - 1).bit_length()
    if (stack + 1) << bits >= 2**31:
        return jnp.argsort(flat, stable=True), sizes
    # As one number, a fourth of the program on a TPU: sorting by two keys, or in a stable way, is long there.
    keys = lax.sort((flat << bits) | jnp.arange(len(flat), dtype=flat.dtype), is_stable=False)
    return keys & ((1 << bits) - 1), sizes
