"""One expert: two matrices into a clamped SwiGLU, one back. Shape letters: ``D`` width, ``I`` inner width."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv4_convert.model.parameters import linear


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
