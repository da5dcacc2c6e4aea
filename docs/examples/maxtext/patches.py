"""Two steps of the release's mathematics that MaxText 0.2.5 leaves out. Each patch is a context for running models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from maxtext.layers import linears
from maxtext.layers.embeddings import DeepSeekV4RotaryEmbedding, YarnRotaryEmbedding

from dsv4_convert import Config


def yarn(config: Config) -> AbstractContextManager[Any]:
    """YaRN in the layers with a compressor, which are those with its base, by the ramp that MaxText has already."""
    scaling = config.yarn
    assert scaling is not None, "this model has no YaRN"
    plain = DeepSeekV4RotaryEmbedding.inv_freq.fget

    def inv_freq(self: DeepSeekV4RotaryEmbedding) -> jax.Array:
        frequencies = plain(self)
        if self.rope_theta != config.compress_rope_theta:
            return frequencies
        theirs = YarnRotaryEmbedding(self.dim, mesh=None)
        context = scaling.original_max_position_embeddings
        turns = (scaling.beta_fast, scaling.beta_slow)
        ends = theirs._find_correction_range(*turns, self.dim, self.rope_theta, context, truncate=True)
        ramp = theirs._linear_ramp_factor(*ends, len(frequencies))
        return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)

    return mock.patch.object(DeepSeekV4RotaryEmbedding, "inv_freq", property(inv_freq))


def clamp(config: Config) -> AbstractContextManager[Any]:
    """The clamp of the shared expert: its gate, which goes through silu, from above, its other half on both sides."""
    limit = config.swiglu_limit
    lowest = {"silu": None, "linear": -limit}
    convert = linears._convert_to_activation_function

    def converted(name: str) -> Callable[[jax.Array], jax.Array]:
        activation = convert(name)
        return (lambda x: activation(jnp.clip(x, lowest[name], limit))) if name in lowest else activation

    return mock.patch.object(linears, "_convert_to_activation_function", converted)
