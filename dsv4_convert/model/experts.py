"""Routed experts and the shared expert: a clamped SwiGLU, computed only for the tokens that are routed to it.

Shape letters: ``B`` batch, ``S`` tokens, ``M`` tokens of all prompts, ``D`` width, ``I`` inner width, ``E`` experts,
``K`` experts per token. Source: paper section 2.1; published inference code, ``Expert`` and ``MoE``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from dsv4_convert.model.axes import all_gather, axis_index, psum, psum_scatter, shard_map
from dsv4_convert.model.encoded import FEW_ROWS, Encoded, Matrix, member
from dsv4_convert.model.grouped_codes import ragged_dot_codes
from dsv4_convert.model.numerics import PLAIN, Numerics
from dsv4_convert.model.ops import parameter, precision
from dsv4_convert.model.router import Routing
from dsv4_convert.spec.config import Config

#: The two ways to compute routed experts: :func:`grouped` and :func:`packed`.
ExpertPath: TypeAlias = Literal["grouped", "packed"]
#: Rows of one step on accelerators: enough that reading the experts' matrices again costs little beside the products.
_ROWS = 8192
#: Rows of the tiles of :func:`packed`. On CPU, reading an expert's matrices takes as long as the product of 28 rows.
#: Decoding them takes longer, so few rows are multiplied with the codes.
CPU_TILES, CPU_TILES_ENCODED, ACCELERATOR_TILES = (192, 112, 56, 24, 8), (128, FEW_ROWS, 1), (256, 32)


def swiglu(gate: Float[Array, "*batch I"], up: Float[Array, "*batch I"], limit: float) -> Float[Array, "*batch I"]:
    """``silu(min(gate, limit)) * clip(up, -limit, limit)`` in float32: the gate has no lower limit."""
    dtype = gate.dtype
    gate = jnp.minimum(gate.astype(jnp.float32), limit)
    up = jnp.clip(up.astype(jnp.float32), -limit, limit)
    return (jax.nn.silu(gate) * up).astype(dtype)


def mlp(
    x: Float[Array, "*batch D"],
    w1: Float[Matrix, "D I"],
    w2: Float[Matrix, "I D"],
    w3: Float[Matrix, "D I"],
    limit: float,
    numerics: Numerics = PLAIN,
    share: Float[Array, "*batch"] | None = None,
) -> Float[Array, "*batch D"]:
    """One expert: ``(swiglu(x w1, x w3) share) w2``, where ``share`` is a weight per token (None: 1)."""
    gate, up = numerics.linear(x, w1), numerics.linear(x, w3)
    inner = swiglu(numerics.wide(gate), numerics.wide(up), limit)
    if share is not None:
        inner *= share[..., None]
    return numerics.linear(inner.astype(x.dtype), w2)


def weighted(
    x: Float[Array, "*batch D"],
    share: Float[Array, "*batch"],
    w1: Float[Matrix, "D I"],
    w2: Float[Matrix, "I D"],
    w3: Float[Matrix, "D I"],
    limit: float,
    numerics: Numerics = PLAIN,
) -> Float[Array, "*batch D"]:
    """Output of a routed expert times the routing weights ``share`` of its tokens, float32.

    A release multiplies the weights in before the last matrix, where its inputs are rounded.
    """
    if numerics.release:
        return mlp(x, w1, w2, w3, limit, numerics, share).astype(jnp.float32)
    return mlp(x, w1, w2, w3, limit, numerics).astype(jnp.float32) * share[..., None]


class SharedExpert(nnx.Module):
    """The expert that every token goes to, with the same clamp as the routed ones."""

    def __init__(self, config: Config, numerics: Numerics) -> None:
        self.numerics = numerics
        self.limit = config.swiglu_limit
        self.w1 = parameter("width inner", config.hidden_size, config.moe_intermediate_size)
        self.w2 = parameter("inner width", config.moe_intermediate_size, config.hidden_size)
        self.w3 = parameter("width inner", config.hidden_size, config.moe_intermediate_size)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Output of the shared expert."""
        return mlp(x, self.w1.get_value(), self.w2.get_value(), self.w3.get_value(), self.limit, self.numerics)


class Experts(nnx.Module):
    """The routed experts, stacked ``[E, ...]``. ``path``: how they are computed; None for :func:`expert_path`."""

    def __init__(self, config: Config, numerics: Numerics) -> None:
        self.path: ExpertPath | None = None
        self.numerics = numerics
        self.limit = config.swiglu_limit
        stack, width, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.w1 = parameter("experts width inner", stack, width, inner)
        self.w2 = parameter("experts inner width", stack, inner, width)
        self.w3 = parameter("experts width inner", stack, width, inner)

    def __call__(self, x: Float[Array, "B S D"], routing: Routing) -> Float[Array, "B S D"]:
        """Sum of the chosen experts' outputs, each times its weight; accumulated in float32."""
        stacks = (self.w1.get_value(), self.w2.get_value(), self.w3.get_value())
        total = _sum_of_experts(x, *routing, *stacks, way=self._way)
        return self.numerics.sum_of_experts(total, x.dtype)

    def _way(self, platform: str) -> Callable[..., Array]:
        """:func:`grouped` or :func:`packed`, on a platform."""
        encoded = isinstance(self.w1.get_value(), Encoded)
        if (self.path or expert_path(platform, encoded=encoded)) == "grouped":
            return partial(grouped, limit=self.limit, numerics=self.numerics)
        cpu_tiles = CPU_TILES_ENCODED if encoded else CPU_TILES
        tiles = cpu_tiles if platform == "cpu" else ACCELERATOR_TILES
        return partial(packed, limit=self.limit, numerics=self.numerics, tiles=tiles)


@shard_map(E="experts", I="inner")
def _sum_of_experts(
    x: Float[Array, "B S D"],
    experts: Int[Array, "B S K"],
    weights: Float[Array, "B S K"],
    w1: Float[Array | Encoded, "E D I"],
    w2: Float[Array | Encoded, "E I D"],
    w3: Float[Array | Encoded, "E D I"],
    *,
    way: Callable[[str], Callable[..., Array]],
) -> Float[Array, "B S D"]:
    """The float32 sum over the chosen experts of every token.

    On a mesh every device computes the experts that it holds, for the tokens of all devices that share the experts. No
    expert's matrices move, except along their width where ``fsdp`` splits them. ``way``: the function that computes
    them, by platform.
    """
    x, experts, weights = all_gather((x, experts, weights), "experts")
    experts = experts - axis_index("experts") * w1.shape[0]
    rows, *routing = (part.reshape(-1, part.shape[-1]) for part in (x, experts, weights))
    ways = {platform: way(platform) for platform in ("cpu", "tpu")}
    total = lax.platform_dependent(rows, Routing(*routing), w1, w2, w3, **ways, default=way("cuda"))
    return psum_scatter(psum(total.reshape(x.shape), "inner"), "experts")


def expert_path(platform: str, *, encoded: bool) -> ExpertPath:
    """How a platform computes routed experts whose stacks are ``encoded`` or expanded.

    Accelerators run one grouped matmul per matrix. XLA's grouped matmul on CPU computes every expert for every row, so
    there the rows are packed. It also would decode all experts at once, so encoded stacks need a kernel, which exists
    for TPUs; on GPUs their rows are packed.
    """
    return "packed" if platform == "cpu" or (encoded and platform != "tpu") else "grouped"


def grouped(
    x: Float[Array, "M D"],
    routing: Routing,
    w1: Float[Array | Encoded, "E D I"],
    w2: Float[Array | Encoded, "E I D"],
    w3: Float[Array | Encoded, "E D I"],
    *,
    limit: float,
    numerics: Numerics = PLAIN,
) -> Float[Array, "M D"]:
    """The chosen experts' outputs, each times its weight, summed in float32; experts outside the stack add nothing.

    Rows are sorted by expert, then one ragged matmul per matrix covers all experts; encoded stacks are decoded inside
    it, tile by tile. A loop takes a few thousand rows at a time, so memory has a bound whatever the routing, and no row
    is dropped.
    """
    tokens, chosen = routing.experts.shape
    order, sizes = _by_expert(routing.experts, w1.shape[0])
    ends = jnp.cumulative_sum(sizes)
    x = numerics.input(x)

    def add(first: Array | int, total: Array, tile: int) -> Array:
        """Add the outputs of the rows from ``first`` on."""
        row = first + jnp.arange(tile)
        pick = order[jnp.minimum(row, tokens * chosen - 1)]
        share = routing.weights.reshape(-1)[pick][:, None]
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
    rows: Float[Array, "R inner"],
    stack: Float[Array | Encoded, "E inner outer"],
    sizes: Int[Array, " E"],
    numerics: Numerics,
) -> Float[Array, "R outer"]:
    """Multiply rows, sorted by expert, each with its expert's matrix; rows of no expert are undefined."""
    dtype = stack.dtype if numerics.quantized else rows.dtype
    if isinstance(stack, Encoded):
        return ragged_dot_codes(rows.astype(dtype), stack, sizes).astype(rows.dtype)
    operands = (rows.astype(dtype), stack.astype(dtype))
    product = lax.ragged_dot(*operands, sizes, precision=precision(*operands), preferred_element_type=jnp.float32)
    return product.astype(rows.dtype)


def packed(
    x: Float[Array, "M D"],
    routing: Routing,
    w1: Float[Array | Encoded, "E D I"],
    w2: Float[Array | Encoded, "E I D"],
    w3: Float[Array | Encoded, "E D I"],
    *,
    limit: float,
    numerics: Numerics = PLAIN,
    tiles: tuple[int, ...] = CPU_TILES,
) -> Float[Array, "M D"]:
    """The same sum as :func:`grouped`, expert by expert in tiles of a few fixed numbers of rows.

    The rows of an expert go through its matrices in tiles, the largest first. A loop runs over the tiles that exist, so
    an expert without rows is not read, and no row is dropped. All shapes are fixed; the routing only decides what runs.

    A matrix leaves its stack block by block (:class:`~dsv4_convert.model.encoded.Member`). For more than a few rows,
    encoded ones are decoded, and one decoded expert is in memory at a time.
    """
    tokens, chosen = routing.experts.shape
    stack = w1.shape[0]
    order, sizes = _by_expert(routing.experts, stack)
    first_row = jnp.cumulative_sum(sizes, include_initial=True)
    flat_weights = routing.weights.reshape(-1)

    def tile_by_tile(total: Array, next_row: Array, count: Array, tile: int) -> Array:
        """Add ``count`` tiles of each expert, from its ``next_row`` on."""
        first_tile = jnp.cumulative_sum(count, include_initial=True)

        def body(state: tuple[Array, Array]) -> tuple[Array, Array]:
            index, total = state
            expert = jnp.searchsorted(first_tile, index, side="right") - 1
            row = next_row[expert] + (index - first_tile[expert]) * tile + jnp.arange(tile)
            pick = order[jnp.minimum(row, tokens * chosen - 1)]
            gate, down, up = (member(w, expert) for w in (w1, w2, w3))
            output = weighted(x[pick // chosen], flat_weights[pick], gate, down, up, limit, numerics)
            return index + 1, total.at[jnp.where(row < first_row[expert + 1], pick // chosen, tokens)].add(output)

        start = jnp.zeros((), first_tile.dtype)
        return lax.while_loop(lambda state: state[0] < first_tile[stack], body, (start, total))[1]

    total, next_row = jnp.zeros((tokens + 1, x.shape[1]), jnp.float32), first_row[:-1]
    for tile, smaller in zip(tiles, (*tiles[1:], 0), strict=True):
        if smaller >= tokens * chosen:
            continue
        # More rows than a smaller tile holds go through one of these.
        count = jnp.maximum(first_row[1:] - next_row + tile - smaller - 1, 0) // tile
        total = tile_by_tile(total, next_row, count, tile)
        next_row += count * tile
    return total[:tokens]


def _by_expert(experts: Int[Array, "M K"], stack: int) -> tuple[Int[Array, " MK"], Int[Array, " E"]]:
    """Stable order of the M*K choices by expert, and the count of each; choices outside the stack come last."""
    flat = experts.reshape(-1)
    flat = jnp.where((flat < 0) | (flat >= stack), stack, flat)
    sizes, bits = jnp.bincount(flat, length=stack), (len(flat) - 1).bit_length()
    if (stack + 1) << bits >= 2**31:
        return jnp.argsort(flat, stable=True), sizes
    # Sorting one packed key takes a quarter of the TPU program that a stable sort, or one by two keys, takes.
    keys = lax.sort((flat << bits) | jnp.arange(len(flat), dtype=flat.dtype), is_stable=False)
    return keys & ((1 << bits) - 1), sizes
