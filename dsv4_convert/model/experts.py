"""Routed experts and the shared expert: clamped SwiGLU, computed only for the tokens that were routed to each.

Shape letters: ``M`` tokens, ``D`` width, ``I`` inner width, ``E`` experts, ``K`` experts per token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from dsv4_convert.config import Config
from dsv4_convert.model.parameters import linear, parameter

#: Rows that the CPU path multiplies with one expert at a time.
_TILE = 32


def swiglu(gate: Float[Array, "*batch I"], up: Float[Array, "*batch I"], limit: float) -> Float[Array, "*batch I"]:
    """``silu(min(gate, limit)) * clip(up, -limit, limit)`` in float32: the gate has no lower limit."""
    dtype = gate.dtype
    gate = jnp.minimum(gate.astype(jnp.float32), limit)
    up = jnp.clip(up.astype(jnp.float32), -limit, limit)
    return (jax.nn.silu(gate) * up).astype(dtype)


def mlp(
    x: Float[Array, "*batch D"],
    w1: Float[Array, "D I"],
    w2: Float[Array, "I D"],
    w3: Float[Array, "D I"],
    limit: float,
) -> Float[Array, "*batch D"]:
    """One expert: ``swiglu(x w1, x w3) w2``."""
    return linear(swiglu(linear(x, w1), linear(x, w3), limit), w2)


class SharedExpert(nnx.Module):
    """The expert that every token goes to, with the same clamp as the routed ones."""

    def __init__(self, config: Config) -> None:
        self.limit = config.swiglu_limit
        self.w1 = parameter(config.hidden_size, config.moe_intermediate_size)
        self.w2 = parameter(config.moe_intermediate_size, config.hidden_size)
        self.w3 = parameter(config.hidden_size, config.moe_intermediate_size)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Output of the shared expert."""
        return mlp(x, self.w1[...], self.w2[...], self.w3[...], self.limit)


class Experts(nnx.Module):
    """The routed experts, stacked ``[E, ...]``."""

    def __init__(self, config: Config) -> None:
        self.limit = config.swiglu_limit
        stack = config.n_routed_experts
        self.w1 = parameter(stack, config.hidden_size, config.moe_intermediate_size)
        self.w2 = parameter(stack, config.moe_intermediate_size, config.hidden_size)
        self.w3 = parameter(stack, config.hidden_size, config.moe_intermediate_size)

    def __call__(
        self, x: Float[Array, "M D"], experts: Int[Array, "M K"], weights: Float[Array, "M K"]
    ) -> Float[Array, "M D"]:
        """Sum of the chosen experts' outputs, each times its weight; accumulated in float32.

        On accelerators one grouped matmul per matrix. XLA's own grouped matmul on CPU computes every expert for every
        row, so there the rows are taken in tiles of one expert each.
        """
        stacks = (self.w1[...], self.w2[...], self.w3[...])
        return lax.platform_dependent(
            x,
            experts,
            weights,
            *stacks,
            cpu=lambda *args: tiled(*args, limit=self.limit),
            default=lambda *args: grouped(*args, limit=self.limit),
        )


def grouped(
    x: Float[Array, "M D"],
    experts: Int[Array, "M K"],
    weights: Float[Array, "M K"],
    w1: Float[Array, "E D I"],
    w2: Float[Array, "E I D"],
    w3: Float[Array, "E D I"],
    *,
    limit: float,
) -> Float[Array, "M D"]:
    """Rows sorted by expert, then one ragged matmul per matrix over all experts."""
    order, sizes = _by_expert(experts, w1.shape[0])
    tokens = order // experts.shape[1]
    rows = x[tokens]

    def matmul(rows: Array, stack: Array) -> Array:
        product = lax.ragged_dot(
            rows,
            stack.astype(rows.dtype),
            sizes,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return product.astype(rows.dtype)

    outputs = matmul(swiglu(matmul(rows, w1), matmul(rows, w3), limit), w2)
    weighted = outputs.astype(jnp.float32) * weights.reshape(-1)[order][:, None]
    return jnp.zeros(x.shape, jnp.float32).at[tokens].add(weighted).astype(x.dtype)


def tiled(
    x: Float[Array, "M D"],
    experts: Int[Array, "M K"],
    weights: Float[Array, "M K"],
    w1: Float[Array, "E D I"],
    w2: Float[Array, "E I D"],
    w3: Float[Array, "E D I"],
    *,
    limit: float,
) -> Float[Array, "M D"]:
    """The same sum as :func:`grouped`, one expert's tile of at most ``_TILE`` rows after the other.

    A loop over the tiles that exist: its length depends on the routing, its shapes do not, and an expert that no token
    chose is never read.
    """
    tokens, chosen = experts.shape
    stack = w1.shape[0]
    order, sizes = _by_expert(experts, stack)
    first_row = jnp.cumulative_sum(sizes, include_initial=True)
    first_tile = jnp.cumulative_sum(-(-sizes // _TILE), include_initial=True)
    flat_weights = weights.reshape(-1)

    def body(state: tuple[Array, Array]) -> tuple[Array, Array]:
        tile, total = state
        expert = jnp.searchsorted(first_tile, tile, side="right") - 1
        row = first_row[expert] + (tile - first_tile[expert]) * _TILE + jnp.arange(_TILE)
        inside = row < first_row[expert + 1]
        pick = order[jnp.minimum(row, tokens * chosen - 1)]
        # Rows past the expert's last one are computed for nothing and added to a row that is cut off.
        target = jnp.where(inside, pick // chosen, tokens)
        output = mlp(x[pick // chosen], w1[expert], w2[expert], w3[expert], limit)
        return tile + 1, total.at[target].add(output.astype(jnp.float32) * flat_weights[pick][:, None])

    start = (jnp.zeros((), first_tile.dtype), jnp.zeros((tokens + 1, x.shape[1]), jnp.float32))
    _, total = lax.while_loop(lambda state: state[0] < first_tile[stack], body, start)
    return total[:tokens].astype(x.dtype)


def _by_expert(experts: Int[Array, "M K"], stack: int) -> tuple[Int[Array, " MK"], Int[Array, " E"]]:
    """Order of the M*K choices by expert (stable), and how many each expert has."""
    flat = experts.reshape(-1)
    return jnp.argsort(flat, stable=True), jnp.bincount(flat, length=stack)
