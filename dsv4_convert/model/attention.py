"""Attention of one layer: a sliding window, and beside it the compressed past (paper section 2.3).

Shape letters: ``B`` batch, ``S`` tokens, ``T`` compressed entries, ``D`` model width, ``R`` query rank, ``H`` heads,
``C`` head width, ``G`` output groups, ``I`` and ``O`` input and output width of one group, ``Q`` queries of a run,
``BR`` runs of all prompts, ``X`` keys.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from dsv4_convert.config import Attention as Kind
from dsv4_convert.config import Config
from dsv4_convert.model.compressor import Compressor
from dsv4_convert.model.indexer import Indexer, chosen_mask
from dsv4_convert.model.norm import rms_norm, unit_rms
from dsv4_convert.model.parameters import contract, linear, parameter
from dsv4_convert.model.recording import Taps
from dsv4_convert.model.rope import frequencies, rotate


class Attention(nnx.Module):
    """Multi-query attention whose single key head is also its value.

    1. q = unit_rms(q_norm(x wq_a) wq_b) per head, kv = kv_norm(x wkv); both rotated.
    2. A query sees the last ``sliding_window`` tokens, itself included, and the compressed entries of complete blocks:
       all of them (HCA) or the indexer's choice (CSA).
    3. One softmax over both, with a learned sink per head in the denominator; scores scaled by C^-0.5.
    4. The context is turned back by the query's position, since values carry the keys' rotation.
    5. Heads in G groups, each through its own low-rank matrix ``wo_a``, then together through ``wo_b``.
    """

    def __init__(self, config: Config, kind: Kind) -> None:
        self.config = config
        self.kind = kind
        heads, width = config.num_attention_heads, config.head_dim
        self.wq_a = parameter(config.hidden_size, config.q_lora_rank)
        self.q_norm = parameter(config.q_lora_rank)
        self.wq_b = parameter(config.q_lora_rank, heads * width)
        self.wkv = parameter(config.hidden_size, width)
        self.kv_norm = parameter(width)
        self.attn_sink = parameter(heads)
        self.wo_a = parameter(config.o_groups, heads * width // config.o_groups, config.o_lora_rank)
        self.wo_b = parameter(config.o_groups * config.o_lora_rank, config.hidden_size)
        self.compressor = _compressor(config, kind)
        self.indexer = Indexer(config) if kind is Kind.CSA else None

    def __call__(self, x: Float[Array, "B S D"], positions: Int[Array, "B S"], taps: Taps) -> Float[Array, "B S D"]:
        """Attention over one prompt. ``positions`` are those of the rotary table; order is that of the tokens."""
        config = self.config
        batch, tokens, _ = x.shape
        eps = config.rms_norm_eps
        table = frequencies(config, self.kind)

        q_low_rank = taps("q_norm", rms_norm(taps("wq_a", linear(x, self.wq_a[...])), self.q_norm[...], eps))
        q = linear(q_low_rank, self.wq_b[...]).reshape(batch, tokens, config.num_attention_heads, config.head_dim)
        q = taps("q", unit_rms(taps("wq_b", q), eps))
        q = taps("q_rope", rotate(q, positions, table))
        kv = taps("kv_norm", rms_norm(taps("wkv", linear(x, self.wkv[...])), self.kv_norm[...], eps))
        kv = taps("kv_rope", rotate(kv, positions, table))

        entries, chosen = kv[:, :0], jnp.zeros((batch, tokens, 0), bool)
        if self.compressor is not None:
            entries = self.compressor(x, positions, table, taps.within("compressor."))
            visible = block_mask(tokens, self.compressor.ratio)
            chosen = jnp.broadcast_to(visible, (batch, *visible.shape))
            if self.indexer is not None:
                index = self.indexer(x, q_low_rank, positions, visible, table, taps.within("indexer."))
                chosen = chosen_mask(index, entries.shape[1])

        # In runs of queries, each with the keys that its window reaches, so that the cost does not grow as S squared.
        queries = in_runs(q, config.sliding_window)
        keys, seen = with_window(kv, entries, in_runs(chosen, config.sliding_window), config.sliding_window)
        context = attend(queries, keys, seen, self.attn_sink[...])
        context = taps("context", context.reshape(batch, -1, *context.shape[2:])[:, :tokens])
        context = taps("context_unrotated", rotate(context, positions, table, inverse=True))
        grouped = context.reshape(batch, tokens, config.o_groups, -1)
        low_rank = taps("wo_a", _grouped_linear(grouped, self.wo_a[...]))
        return taps("wo_b", linear(low_rank.reshape(batch, tokens, -1), self.wo_b[...]))


def _compressor(config: Config, kind: Kind) -> Compressor | None:
    """CSA's blocks overlap, so each token projects to two series of values; HCA's do not."""
    width = config.head_dim
    if kind is Kind.SLIDING:
        return None
    projected = 2 * width if kind is Kind.CSA else width
    return Compressor(config.hidden_size, width, config.ratio(kind), projected, eps=config.rms_norm_eps)


def in_runs(x: Shaped[Array, "B S *rest"], window: int) -> Shaped[Array, "BR Q *rest"]:
    """The tokens of each prompt in runs of equal length ``Q <= window``, one after the other; padded with zeros."""
    batch, tokens, *rest = x.shape
    runs = -(-tokens // window)
    length = -(-tokens // runs)
    padded = jnp.pad(x, ((0, 0), (0, runs * length - tokens), *((0, 0) for _ in rest)))
    return padded.reshape(batch * runs, length, *rest)


def with_window(
    kv: Float[Array, "B S C"], entries: Float[Array, "B T C"], chosen: Bool[Array, "BR Q T"], window: int
) -> tuple[Float[Array, "BR X C"], Bool[Array, "BR Q X"]]:
    """For every run of queries (:func:`in_runs`) the keys that one of them may see, and which of them each does.

    These are the run's own tokens and the ``window - 1`` before it, then all compressed entries.
    """
    (batch, tokens, width), length = kv.shape, chosen.shape[1]
    runs = chosen.shape[0] // batch
    before = min(window - 1, (runs - 1) * length)
    at = length * jnp.arange(runs)[:, None] + jnp.arange(before + length)
    keys = jnp.pad(kv, ((0, 0), (before, runs * length - tokens), (0, 0)))[:, at]
    keys = jnp.concatenate([keys, jnp.broadcast_to(entries[:, None], (batch, runs, *entries.shape[1:]))], axis=2)
    distance = jnp.arange(length)[:, None] + before - jnp.arange(before + length)
    inside = window_mask(distance, window) & (at >= before)[:, None]  # the first run has padding before it
    inside = jnp.broadcast_to(inside, (batch, *inside.shape)).reshape(batch * runs, length, -1)
    return keys.reshape(batch * runs, -1, width), jnp.concatenate([inside, chosen], axis=2)


def window_mask(distance: Int[Array, "Q X"], window: int) -> Bool[Array, "Q X"]:
    """Which keys a query sees, by the number of tokens that it is after them: itself and the ``window - 1`` before."""
    return (distance >= 0) & (distance < window)


def block_mask(tokens: int, ratio: int) -> Bool[Array, "S T"]:
    """[query, entry]: entries of blocks that are complete at the query, the query's own token included."""
    return jnp.arange(tokens // ratio)[None, :] < (jnp.arange(tokens)[:, None] + 1) // ratio


def attend(
    q: Float[Array, "B S H C"], kv: Float[Array, "B X C"], seen: Bool[Array, "B S X"], sink: Float[Array, " H"]
) -> Float[Array, "B S H C"]:
    """Softmax attention over keys that are also the values, with a sink per head that adds to the denominator only.

    Scores, softmax and the sum over values in float32; the probabilities are rounded to the dtype of ``kv``.
    """
    # Heads stay behind the queries: with one key for all heads this is one large matmul, and nothing is transposed.
    scores = contract("bshc,bxc->bshx", q, kv) * q.shape[-1] ** -0.5
    scores = jnp.where(seen[:, :, None], scores, -jnp.inf)
    sinks = sink.astype(jnp.float32)[:, None]
    peak = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks)
    weights = jnp.exp(scores - peak)
    shares = weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - peak))
    return contract("bshx,bxc->bshc", shares.astype(kv.dtype), kv).astype(q.dtype)


def _grouped_linear(x: Float[Array, "B S G I"], w: Float[Array, "G I O"]) -> Float[Array, "B S G O"]:
    """Every group of heads through its own matrix."""
    return contract("bsgi,gio->bsgo", x, w.astype(x.dtype)).astype(x.dtype)
