"""One expert: two matrices into a clamped SwiGLU, one back. Shape letters: ``D`` width, ``I`` inner width."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv4_convert.model.numerics import PLAIN, Numerics


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
    numerics: Numerics = PLAIN,
    share: Float[Array, "*batch"] | None = None,
) -> Float[Array, "*batch D"]:
    """One expert: ``(swiglu(x w1, x w3) share) w2``."""
    gate, up = numerics.linear(x, w1), numerics.linear(x, w3)
    inner = swiglu(numerics.wide(gate), numerics.wide(up), limit)
    if share is not None:
        inner *= share[..., None]
    return numerics.linear(inner.astype(x.dtype), w2)


def weighted(
    x: Float[Array, "*batch D"],
    share: Float[Array, "*batch"],
    w1: Float[Array, "D I"],
    w2: Float[Array, "I D"],
    w3: Float[Array, "D I"],
    limit: float,
    numerics: Numerics = PLAIN,
) -> Float[Array, "*batch D"]:
    """What a routed expert adds to its tokens, float32: its output times their routing weights ``share``."""
    if numerics.release:
        return mlp(x, w1, w2, w3, limit, numerics, share).astype(jnp.float32)
    return mlp(x, w1, w2, w3, limit, numerics).astype(jnp.float32) * share[..., None]
