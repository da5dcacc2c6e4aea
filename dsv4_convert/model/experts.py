"""Routed experts and the shared expert: clamped SwiGLU, computed only for the tokens that were routed to each.

Shape letters: ``B`` batch, ``S`` tokens, ``D`` width, ``K`` experts per token.
"""

from __future__ import annotations

from functools import partial

from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from dsv4_convert.model.axes import gathered, on_shards, place, scattered, summed
from dsv4_convert.model.encoded import Encoded
from dsv4_convert.model.mlp import mlp
from dsv4_convert.model.numerics import Numerics
from dsv4_convert.model.parameters import parameter
from dsv4_convert.model.routed import ACCELERATOR_TILES, grouped, packed
from dsv4_convert.spec.config import Config

Stack = Array | Encoded


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
        return mlp(x, self.w1[...], self.w2[...], self.w3[...], self.limit, self.numerics)


class Experts(nnx.Module):
    """The routed experts, stacked ``[E, ...]``."""

    def __init__(self, config: Config, numerics: Numerics) -> None:
        self.numerics = numerics
        self.limit = config.swiglu_limit
        stack, width, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.w1 = parameter("experts width inner", stack, width, inner)
        self.w2 = parameter("experts inner width", stack, inner, width)
        self.w3 = parameter("experts width inner", stack, width, inner)

    def __call__(
        self, x: Float[Array, "B S D"], experts: Int[Array, "B S K"], weights: Float[Array, "B S K"]
    ) -> Float[Array, "B S D"]:
        """Sum of the chosen experts' outputs, each times its weight; accumulated in float32.

        On a mesh every device computes the experts that it holds, for the tokens of all devices that hold the others;
        no expert's matrices travel but along their width, where ``fsdp`` splits them.
        """
        rows, stack = "batch tokens -", ("experts - inner", "experts inner -", "experts - inner")
        stacks = (self.w1.get_value(), self.w2.get_value(), self.w3.get_value())
        total = on_shards(self._sum, (rows, rows, rows, *stack), rows, x, experts, weights, *stacks)
        return self.numerics.sum_of_experts(total, x.dtype)

    def _sum(self, x: Array, experts: Array, weights: Array, w1: Stack, w2: Stack, w3: Stack) -> Array:
        """The sum over the experts of all devices for the tokens of this one, float32.

        On accelerators one grouped matmul per matrix. XLA's own grouped matmul on CPU computes every expert for every
        row, so there the rows are packed another way. Encoded stacks go that way everywhere: a grouped matmul would
        have all of their experts decoded at once.
        """
        x, experts, weights = gathered((x, experts, weights), "experts")
        experts = experts - place("experts") * w1.shape[0]
        on_cpu = partial(packed, limit=self.limit, numerics=self.numerics)
        encoded = partial(packed, limit=self.limit, numerics=self.numerics, tiles=ACCELERATOR_TILES)
        default = encoded if isinstance(w1, Encoded) else partial(grouped, limit=self.limit, numerics=self.numerics)
        rows = (part.reshape(-1, part.shape[-1]) for part in (x, experts, weights))
        total = lax.platform_dependent(*rows, w1, w2, w3, cpu=on_cpu, default=default)
        return scattered(summed(total.reshape(x.shape), "inner"), "experts")
