"""Chooses the experts of each token, and their weights (paper section 2.1).

Shape letters: ``B`` batch, ``S`` tokens, ``D`` width, ``E`` experts, ``K`` experts per token, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv4_convert.model.numerics import Numerics
from dsv4_convert.model.ops import buffer, linear, parameter
from dsv4_convert.model.recording import Taps
from dsv4_convert.spec.config import Config


class Routing(NamedTuple):
    """Chosen experts of every token, ascending, and their weights."""

    experts: Int[Array, "*batch K"]
    weights: Float[Array, "*batch K"]


class Router(nnx.Module):
    """Scores every expert for every token and keeps K.

    s = sqrt(softplus(x W)) scores E experts. The K chosen are the best by s + bias; in hash-routed layers a fixed table
    lists them by token id. Their weights are the *unbiased* scores w_k = f s_k / (sum_j s_j + 1e-20), where j runs over
    the chosen and f is ``routed_scaling_factor``.

    Source: published inference code, ``Gate``. The 1e-20 is transformers'; it changes no float32.
    """

    def __init__(self, config: Config, *, hashed: bool, numerics: Numerics) -> None:
        self.numerics = numerics
        self.topk, self.scaling = config.num_experts_per_tok, config.routed_scaling_factor
        self.weight = parameter("width expert_score", config.hidden_size, config.n_routed_experts)
        self.bias = None if hashed else buffer("expert_score", config.n_routed_experts)
        self.tid2eid = buffer("token choice", config.vocab_size, self.topk, dtype=jnp.int32) if hashed else None

    def __call__(self, x: Float[Array, "B S D"], token_ids: Int[Array, "B S"], taps: Taps) -> Routing:
        """Route every token. ``token_ids`` matter in hash-routed layers only."""
        logits = taps("logits", linear(self.numerics.wide(x), self.weight[...]))
        scores = jnp.sqrt(jax.nn.softplus(logits.astype(jnp.float32)))
        if self.tid2eid is not None:
            chosen = self.tid2eid[...][token_ids]
        else:
            assert self.bias is not None
            _, chosen = jax.lax.top_k(taps("scores", scores + self.bias[...]), self.topk)
        chosen = taps("experts", jnp.sort(chosen.astype(jnp.int32), axis=-1, stable=False))
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20) * self.scaling
        return Routing(chosen, taps("weights", weights))
