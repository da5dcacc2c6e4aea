"""Routed experts and the shared expert: clamped SwiGLU, computed only for the tokens that were routed to each.

Shape letters: ``M`` tokens, ``D`` width, ``I`` inner width, ``E`` experts, ``K`` experts per token.
"""

from __future__ import annotations

from functools import partial

from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from dsv4_convert.config import Config
from dsv4_convert.model.mlp import mlp
from dsv4_convert.model.numerics import Numerics
from dsv4_convert.model.parameters import parameter
from dsv4_convert.model.routed import grouped, packed


class SharedExpert(nnx.Module):
    """The expert that every token goes to, with the same clamp as the routed ones."""

    def __init__(self, config: Config, numerics: Numerics) -> None:
        self.numerics = numerics
        self.limit = config.swiglu_limit
        self.w1 = parameter(config.hidden_size, config.moe_intermediate_size)
        self.w2 = parameter(config.moe_intermediate_size, config.hidden_size)
        self.w3 = parameter(config.hidden_size, config.moe_intermediate_size)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Output of the shared expert."""
        return mlp(x, self.w1[...], self.w2[...], self.w3[...], self.limit, self.numerics)


class Experts(nnx.Module):
    """The routed experts, stacked ``[E, ...]``."""

    def __init__(self, config: Config, numerics: Numerics) -> None:
        self.numerics = numerics
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
        row, so there the rows are packed another way.
        """
        stacks = (self.w1[...], self.w2[...], self.w3[...])
        return lax.platform_dependent(
            x,
            experts,
            weights,
            *stacks,
            cpu=partial(packed, limit=self.limit, numerics=self.numerics),
            default=partial(grouped, limit=self.limit, numerics=self.numerics),
        )
