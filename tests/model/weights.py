"""A model with random weights, for tests that compare it with itself in another way of running it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv4_convert.model.architectures import model_of
from dsv4_convert.model.model import Decoder
from dsv4_convert.spec.config import Config


def random_model(config: Config) -> tuple[nnx.GraphDef[Decoder], nnx.State[Any, Any]]:
    """Graph and weights; no norm is 1, no bias and no sink 0, and the hash tables are random."""
    graph, state = nnx.split(nnx.eval_shape(lambda: model_of(config)))
    rng = np.random.default_rng(0)
    filled = {
        key: variable.replace(
            jnp.asarray(rng.integers(0, config.n_routed_experts, variable.shape), jnp.int32)
            if variable.dtype == jnp.int32
            else jnp.asarray(rng.normal(size=variable.shape) / max(1, variable.shape[0]) ** 0.5, jnp.float32)
        )
        for key, variable in nnx.to_flat_state(state)
    }
    return graph, nnx.from_flat_state(filled)
