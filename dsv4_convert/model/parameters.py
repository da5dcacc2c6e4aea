"""How a parameter is declared, and the two operations that every block uses on one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Buffer(nnx.Variable[jax.Array]):
    """State of the checkpoint that is not trained by gradient: the hash table and the router's correction bias."""


def parameter(*shape: int) -> nnx.Param[jax.Array]:
    """A weight of the checkpoint; zero until it is restored."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))


def linear(x: Float[Array, "*batch inner"], w: Float[Array, "inner outer"]) -> Float[Array, "*batch outer"]:
    """``x @ w`` in the dtype of ``x``, accumulated in float32."""
    product = jnp.matmul(x, w.astype(x.dtype), precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return product.astype(x.dtype)
