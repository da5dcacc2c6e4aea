"""Partial, interleaved rotary embedding with two tables (published inference code; paper section 2.3).

The last ``qk_rope_head_dim`` channels of a vector are read as complex numbers ``x0 + i x1, x2 + i x3, ...`` and rotated
by ``position * frequency``. Window-only layers use base ``rope_theta``; layers with a compressor use
``compress_rope_theta`` scaled by YaRN, for queries, keys, compressed entries and the indexer alike. No attention
factor is applied anywhere.

Because keys are also the values, the attention output carries the keys' rotations; rotating it back by the query's
position leaves a function of the distance only.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv4_convert.spec.config import Config, Yarn


def frequencies(config: Config, *, compressed: bool) -> np.ndarray:
    """Angle per position of each channel pair, in layers with a ``compressed`` past or without: float32 ``[pairs]``."""
    if not compressed:
        return _scaled(config.qk_rope_head_dim, config.rope_theta, None)
    return _scaled(config.qk_rope_head_dim, config.compress_rope_theta, config.yarn)


def _scaled(dim: int, theta: float, yarn: Yarn | None) -> np.ndarray:
    """Every step is rounded to float32 as in the published code: at large positions one more correct digit in a
    frequency would already be another table."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / powers
    if yarn is None:
        return plain
    keep = np.float32(1) - _ramp(dim, theta, yarn)
    interpolated = np.float32(1) / (np.float32(yarn.factor) * powers)
    return interpolated * (np.float32(1) - keep) + plain * keep


def _ramp(dim: int, theta: float, yarn: Yarn) -> np.ndarray:
    """How much each frequency is interpolated: 0 for fast ones (left alone), 1 for slow ones; float32."""

    def pair_of(turns: float) -> float:
        """Index of the channel pair that makes ``turns`` turns over the original context."""
        return dim * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(yarn.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    pairs = np.arange(dim // 2, dtype=np.float32)
    return np.clip((pairs - np.float32(low)) / np.float32(width), np.float32(0), np.float32(1))


def rotate(
    x: Float[Array, "B S *heads width"], positions: Int[Array, "B S"], table: np.ndarray, *, inverse: bool = False
) -> Float[Array, "B S *heads width"]:
    """Rotate the last ``2 * len(table)`` channels of every vector by its position; ``inverse`` rotates back.

    (x_2i + i x_2i+1) exp(i position table_i), computed in float32 and cast back to the dtype of ``x``.
    """
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(table)
    angles = angles.reshape(*angles.shape[:2], *(1,) * (x.ndim - 3), angles.shape[-1])
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if inverse:
        sin = -sin
    nope, rope = jnp.split(x, [x.shape[-1] - 2 * len(table)], axis=-1)
    even, odd = rope[..., 0::2].astype(jnp.float32), rope[..., 1::2].astype(jnp.float32)
    pairs = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return jnp.concatenate([nope, pairs.reshape(rope.shape).astype(x.dtype)], axis=-1)
