"""How a parameter is declared, and the two operations that every block uses on one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsv4_convert.model.axes import named


class Buffer(nnx.Variable[jax.Array]):
    """State of the checkpoint that is not trained by gradient: the hash table and the router's correction bias."""


def parameter(axes: str, *shape: int) -> nnx.Param[jax.Array]:
    """A weight of the checkpoint with its logical axes (:mod:`dsv4_convert.model.axes`); zero until it is restored."""
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=named(axes))


def buffer(axes: str, *shape: int, dtype: DTypeLike = jnp.float32) -> Buffer:
    """A :class:`Buffer` with its logical axes; zero until it is restored."""
    return Buffer(jnp.zeros(shape, dtype), axes=named(axes))


def precision(*operands: Array) -> Any:
    """What a product must be asked for to keep all bits of a float32; bfloat16 numbers have fewer than it takes anyway.

    ``jax.default_matmul_precision`` may ask for less.
    """
    if not any(operand.dtype == jnp.float32 for operand in operands):
        return jax.lax.Precision.DEFAULT
    return jax.config.jax_default_matmul_precision or jax.lax.Precision.HIGHEST  # type: ignore[attr-defined]


def contract(spec: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """``einsum`` of two operands, float32 out: products and sums in float32 whatever the operands are."""

    def direct(a: Array, b: Array) -> Array:
        return jnp.einsum(spec, a, b, precision=precision(a, b), preferred_element_type=jnp.float32)

    def widened(a: Array, b: Array) -> Array:
        return direct(a.astype(jnp.float32), b.astype(jnp.float32))

    if a.dtype == b.dtype == jnp.float32:
        return direct(a, b)
    # XLA on CPU has no matmul of bfloat16 into float32. Widening the operands first gives the same products.
    return jax.lax.platform_dependent(a, b, cpu=widened, default=direct)


def linear(x: Float[Array, "*batch inner"], w: Float[Array, "inner outer"]) -> Float[Array, "*batch outer"]:
    """``x @ w`` in the dtype of ``x``, accumulated in float32."""
    return contract("...i,io->...o", x, w.astype(x.dtype)).astype(x.dtype)
