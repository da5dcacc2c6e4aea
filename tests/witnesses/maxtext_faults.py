"""Faults planted in MaxText's own code, each a mistake that people make in a port. Every function is a context."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from maxtext.kernels.attention import csa_streamindex
from maxtext.layers import attention_compressed, attention_op, embeddings, linears, mhc, moe, normalizations

Fault = AbstractContextManager[Any]


def _around(owner: Any, name: str, changed: Callable[..., Any]) -> Fault:
    """``changed`` gets the original and the arguments of every call."""
    original = getattr(owner, name)
    return mock.patch.object(owner, name, lambda *args, **kwargs: changed(original, *args, **kwargs))


def half_split_rotation() -> Fault:
    """The rotation turns the first half of the channels with the second, instead of neighbours."""

    def rotate_half(x: jax.Array) -> jax.Array:
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([-second, first], axis=-1)

    return mock.patch.object(embeddings, "_rotate_half", rotate_half)


def inverse_rotation_forwards() -> Fault:
    """The output of the attention is rotated forwards, and not back."""

    def apply(original: Any, self: Any, inputs: jax.Array, positions: jax.Array, **options: Any) -> jax.Array:
        return original(self, inputs, positions, **{**options, "reverse": False})

    return _around(attention_compressed.CompressedAttention, "_apply_rotary_embedding_v4", apply)


def one_base_for_all_layers() -> Fault:
    """Layers with a compressor take the base of the others."""

    def frequencies(original: Any, self: Any, positions: jax.Array) -> Any:
        with mock.patch.object(self, "rope_theta", 10000.0):
            return original(self, positions)

    return _around(embeddings.DeepSeekV4RotaryEmbedding, "get_freqs", frequencies)


def mixing_transposed() -> Fault:
    """The mixing of the streams is transposed."""
    return _around(mhc, "sinkhorn", lambda original, t, iters: jnp.swapaxes(original(t, iters), -1, -2))


def mixing_not_iterated() -> Fault:
    """The mixing of the streams is normalised once, and not twenty times."""
    return _around(mhc, "sinkhorn", lambda original, t, iters: original(t, 1))


def spreading_not_doubled() -> Fault:
    """The output of a branch is spread over the streams by a sigmoid, and not by twice of it."""

    def mapping(original: Any, self: Any, h: Any, alpha: Any, beta: Any, scale: float, eps: float = 0.0) -> Any:
        return original(self, h, alpha, beta, 1.0, eps)

    return _around(mhc.ManifoldConstrainedHyperConnections, "mapping", mapping)


def streams_not_normed() -> Fault:
    """The hyper-connections take the streams without their norm."""

    def norm(original: Any, self: Any, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        wide = self.num_features == 128  # four streams of 32
        return x if wide else original(self, x, *args, **kwargs)

    return _around(normalizations.RMSNorm, "__call__", norm)


def query_heads_not_normed() -> Fault:
    """The norm of the query heads, which has no weight, is forgotten."""

    def norm(original: Any, self: Any, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        return original(self, x, *args, **kwargs) if self.with_scale else x

    return _around(normalizations.RMSNorm, "__call__", norm)


def no_sink() -> Fault:
    """The attention has no sink."""
    return _around(
        attention_op.AttentionOp,
        "__call__",
        lambda original, *args, **kwargs: original(*args, **{**kwargs, "sinks": None}),
    )


def window_one_longer() -> Fault:
    """The window is one token longer."""

    def attend(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(self, "sliding_window_size", self.sliding_window_size + 1):
            return original(self, *args, **kwargs)

    return _around(attention_op.AttentionOp, "__call__", attend)


def blocks_do_not_overlap() -> Fault:
    """A CSA entry has its own block twice, and nothing of the block before."""

    def pool(original: Any, kv: jax.Array, gate: jax.Array, norm: Any, width: int, *args: Any, **kwargs: Any) -> Any:
        # The first half of the channels belongs to the block that comes next.
        ahead = [jnp.concatenate([x[:, 1:, :, :width], x[:, :1, :, :width]], axis=1) for x in (kv, gate)]
        whole = [jnp.concatenate([a, x[..., width:]], axis=-1) for a, x in zip(ahead, (kv, gate), strict=True)]
        return original(*whole, norm, width, *args, **kwargs)

    return _around(attention_compressed, "csa_overlap_pooling", pool)


def no_position_in_block() -> Fault:
    """The gates of a block have no position bias."""
    pool = "compute_csa_prefill_chunk_pooling"
    return _around(
        attention_compressed, pool, lambda original, **given: original(**{**given, "position_bias": jnp.float32(0)})
    )


def entries_at_the_end_of_their_block() -> Fault:
    """A CSA entry is rotated to the last position of its block."""

    def pool(original: Any, **given: Any) -> Any:
        turn, ahead = given["rotary_emb"], given["compress_rate"] - 1
        return original(**{**given, "rotary_emb": lambda x, at, **options: turn(x, at + ahead, **options)})

    return _around(attention_compressed, "compute_csa_prefill_chunk_pooling", pool)


def unfinished_blocks_seen() -> Fault:
    """A query of an HCA layer sees the blocks that come after it."""

    def compress(original: Any, *args: Any, **kwargs: Any) -> Any:
        entries, mask = original(*args, **kwargs)
        return entries, jnp.zeros_like(mask)

    return _around(attention_compressed.DeepseekV4HCACompressor, "__call__", compress)


def indexer_without_relu() -> Fault:
    """The indexer's heads have no ReLU."""

    def scores(q: jax.Array, entries: jax.Array, weights: jax.Array, *, softmax_scale: float, **_: Any) -> jax.Array:
        return jnp.einsum("bhsd,bwd,bsh->bsw", q, entries, weights, precision="highest") * softmax_scale

    return mock.patch.object(csa_streamindex, "csa_indexer_scores_jax", scores)


def indexer_takes_the_lowest() -> Fault:
    """The indexer chooses the entries with the lowest scores."""

    def top_k(original: Any, scores: jax.Array, k: int) -> Any:
        values, indices = original(jnp.where(jnp.isinf(scores), scores, -scores), k)
        return -values, indices

    return _around(jax.lax, "top_k", top_k)


def groups_in_another_order() -> Fault:
    """The heads of one group go through the matrix of another."""
    return _around(
        linears.DeepSeekV4GroupedLinear, "__call__", lambda original, self, x: original(self, jnp.roll(x, 1, axis=-2))
    )


def sigmoid_scores() -> Fault:
    """The router's scores are a sigmoid, as in DeepSeek-V3."""
    return _around(
        linears,
        "_convert_to_activation_function",
        lambda original, name: original("sigmoid" if name == "sqrtsoftplus" else name),
    )


def experts_without_their_bias() -> Fault:
    """Experts are chosen without the correction bias."""
    return _around(
        moe.RoutedMoE, "deepseek_routing", lambda original, self, scores, unbiased: original(self, unbiased, unbiased)
    )


def weights_with_their_bias() -> Fault:
    """The correction bias stays in the routing weights."""
    return _around(
        moe.RoutedMoE, "deepseek_routing", lambda original, self, scores, unbiased: original(self, scores, scores)
    )


def weights_not_scaled() -> Fault:
    """`routed_scaling_factor` is left out."""
    return _around(
        moe.RoutedMoE,
        "deepseek_scale_weights",
        lambda original, self, weights: weights / weights.sum(-1, keepdims=True),
    )


def experts_of_the_token_before() -> Fault:
    """The hash table is asked with the tokens moved by one."""

    def top_k(original: Any, self: Any, *args: Any, input_ids: jax.Array, **kwargs: Any) -> Any:
        return original(self, *args, input_ids=jnp.roll(input_ids, 1, axis=-1), **kwargs)

    return _around(moe.RoutedMoE, "get_topk", top_k)


def routed_experts_not_clamped() -> Fault:
    """The routed experts are not clamped."""

    def activation(original: Any, self: Any, gate: jax.Array, up: jax.Array) -> jax.Array:
        return jax.nn.silu(gate) * up

    return _around(moe.RoutedMoE, "apply_ffn_activation", activation)


def shared_expert_twice() -> Fault:
    """The shared expert is added once more."""

    def both(original: Any, self: Any, inputs: jax.Array, *args: Any, **kwargs: Any) -> Any:
        total, *rest = original(self, inputs, *args, **kwargs)
        return total + self.shared_experts(inputs), *rest

    return _around(moe.RoutedAndSharedMoE, "__call__", both)


def head_not_summed() -> Fault:
    """The head takes the mean of the streams, and not their sum."""

    def head(original: Any, self: Any, x: jax.Array) -> jax.Array:
        return original(self, x) / self.mhc_expansion_rate

    return _around(mhc.DeepSeek4HyperHead, "__call__", head)
