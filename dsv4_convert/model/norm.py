"""RMS normalisation, with and without a weight. Statistics and products in float32, one cast back at the end."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rms_scale(x: Float[Array, "*batch width"], eps: float) -> Float[Array, "*batch 1"]:
    """``1 / sqrt(mean(x^2) + eps)`` over the last axis, float32."""
    return lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + eps)


def rms_norm(
    x: Float[Array, "*batch width"], weight: Float[Array, " width"], eps: float
) -> Float[Array, "*batch width"]:
    """``weight * x / rms(x)``. The weight has no offset of 1."""
    return (x.astype(jnp.float32) * rms_scale(x, eps) * weight.astype(jnp.float32)).astype(x.dtype)


def unit_rms(x: Float[Array, "*batch width"], eps: float) -> Float[Array, "*batch width"]:
    """``x / rms(x)``: the weightless norm of every query head."""
    return (x.astype(jnp.float32) * rms_scale(x, eps)).astype(x.dtype)
