"""Attention of one layer: a sliding window, and beside it the compressed past (paper section 2.3).

Shape letters: ``B`` batch, ``S`` tokens, ``T`` compressed entries, ``D`` model width, ``R`` query rank, ``H`` heads,
``C`` head width. ``G`` output groups, ``I`` and ``O`` input and output width of one group. ``Q`` queries of a chunk,
``X`` keys, ``K`` tokens of a call, ``P`` tokens before, ``k`` chosen entries.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsv4_convert.model.axes import axis_index, shard_map
from dsv4_convert.model.cache import LayerCache, Past, latest
from dsv4_convert.model.compressor import Compressor
from dsv4_convert.model.indexer import Indexer, chosen_mask, entry_mask
from dsv4_convert.model.norm import rms_norm
from dsv4_convert.model.numerics import Numerics, round_to
from dsv4_convert.model.ops import einsum_f32, map_query_chunks, parameter
from dsv4_convert.model.recording import Taps
from dsv4_convert.model.rope import frequencies, rotate
from dsv4_convert.spec.config import AttentionKind, Config


class Earlier(NamedTuple):
    """Keys of the ``window - 1`` tokens before a call, and how many tokens there were in all."""

    keys: Float[Array, "B P C"]
    tokens: Int[Array, " B"]


class Entries(NamedTuple):
    """The compressed past: entries, the number that each query may see, and its choice among these (None: all)."""

    values: Float[Array, "B T C"]
    complete: Int[Array, "B S"]
    chosen: Int[Array, "B S k"] | None


class Attention(nnx.Module):
    """Multi-query attention whose single key head is also its value.

    1. q = unit_rms(q_norm(x wq_a) wq_b) per head, kv = kv_norm(x wkv); both rotated.
    2. A query sees the last ``sliding_window`` tokens, itself included, and the compressed entries of complete blocks:
       all of them (HCA) or the indexer's choice (CSA).
    3. One softmax over both, with a learned sink per head in the denominator; scores scaled by C^-0.5.
    4. The context is rotated back by the query's position, since values carry the keys' rotation.
    5. Each of G groups of heads has its own low-rank matrix ``wo_a``; all groups share ``wo_b``.

    Source: paper section 2.3; published inference code, ``Attention``.
    """

    def __init__(self, config: Config, kind: AttentionKind, numerics: Numerics) -> None:
        self.config = config
        self.kind = kind
        self.numerics = numerics
        heads, width = config.num_attention_heads, config.head_dim
        self.wq_a = parameter("width whole_rank", config.hidden_size, config.q_lora_rank)
        self.q_norm = parameter("whole_rank", config.q_lora_rank)
        self.wq_b = parameter("rank heads", config.q_lora_rank, heads * width)
        self.wkv = parameter("width key", config.hidden_size, width)
        self.kv_norm = parameter("key", width)
        self.attn_sink = parameter("heads", heads)
        grouped = heads * width // config.o_groups
        self.wo_a = parameter("groups group_in group_out", config.o_groups, grouped, config.o_lora_rank)
        self.wo_b = parameter("groups width", config.o_groups * config.o_lora_rank, config.hidden_size)
        self.compressor = _compressor(config, kind, numerics)
        self.indexer = Indexer(config, numerics) if kind is AttentionKind.CSA else None

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        taps: Taps,
        past: Past[LayerCache] | None = None,
    ) -> tuple[Float[Array, "B S D"], LayerCache | None]:
        """Attention over whole prompts, or over their next tokens with a ``past``, whose new state comes with it.

        ``positions`` index the rotary tables; masks go by the order of tokens.
        """
        config, numerics = self.config, self.numerics
        batch, tokens, _ = x.shape
        eps = config.rms_norm_eps
        table = frequencies(config, self.kind)

        q_low_rank = taps("q_norm", rms_norm(taps("wq_a", numerics.linear(x, self.wq_a[...])), self.q_norm[...], eps))
        q = numerics.linear(q_low_rank, self.wq_b[...])
        q = taps("wq_b", q.reshape(batch, tokens, config.num_attention_heads, config.head_dim))
        q = taps("q", numerics.query(q, eps))
        q = taps("q_rope", rotate(q, positions, table))
        kv = taps("kv_norm", rms_norm(taps("wkv", numerics.linear(x, self.wkv[...])), self.kv_norm[...], eps))
        kv = taps("kv_rope", numerics.key(rotate(kv, positions, table), config.qk_rope_head_dim))

        before = jnp.zeros(batch, jnp.int32) if past is None else past.before
        entries, compressed, indexed, chosen = kv[:, :0], None, None, None
        complete = jnp.zeros((batch, tokens), jnp.int32)
        if self.compressor is not None:
            at = None if past is None else past.of(past.cache.compressor)
            entries, compressed = self.compressor(x, positions, table, taps.within("compressor."), at)
            complete = complete_blocks(before[:, None] + jnp.arange(tokens), self.compressor.ratio)
        if self.indexer is not None:
            at = None if past is None else past.of(past.cache.indexer)
            chosen, indexed = self.indexer(x, q_low_rank, positions, complete, table, taps.within("indexer."), at)

        earlier = None if past is None else Earlier(past.cache.window, before)
        sink, window = self.attn_sink[...], config.sliding_window
        past_entries = Entries(entries, complete, chosen)
        context = taps("context", _context(q, kv, earlier, past_entries, sink, window=window, numerics=numerics))
        context = taps("context_unrotated", rotate(context, positions, table, inverse=True))
        grouped = context.reshape(batch, tokens, config.o_groups, -1)
        low_rank = taps("wo_a", _grouped_linear(grouped, self.wo_a[...]))
        output = taps("wo_b", numerics.linear(low_rank.reshape(batch, tokens, -1), self.wo_b[...]))
        if past is None:
            return output, None
        kept = latest(jnp.concatenate([past.cache.window, kv], axis=1), past.kept, window - 1)
        return output, LayerCache(kept, compressed, indexed)


def _compressor(config: Config, kind: AttentionKind, numerics: Numerics) -> Compressor | None:
    """The compressor of a layer. Blocks of CSA overlap, so each token projects to two series of values."""
    width = config.head_dim
    if kind is AttentionKind.SLIDING:
        return None
    projected = 2 * width if kind is AttentionKind.CSA else width
    eps = config.rms_norm_eps
    ratio = config.ratio(kind)
    return Compressor(config.hidden_size, width, ratio, projected, eps=eps, indexed=False, numerics=numerics)


@shard_map()
def _context(
    q: Float[Array, "B S H C"],
    kv: Float[Array, "B K C"],
    earlier: Earlier | None,
    entries: Entries,
    sink: Float[Array, " H"],
    *,
    window: int,
    numerics: Numerics,
) -> Float[Array, "B S H C"]:
    """Attention of every query over the tokens in its window and its compressed entries.

    A chunk of queries meets only the keys that its windows reach, so cost grows with S and not with its square for the
    window, and memory does so for the entries.

    Args:
        q, kv: queries, and keys that are also values, of the tokens of this call. On a mesh that splits tokens a device
            has its own part of the queries and all keys, since these have one head in all.
        earlier: the tokens before; None if there are none.
        entries: the compressed past.
        sink, window, numerics: of the layer.
    """
    reach = min(window, kv.shape[1]) - 1 if earlier is None else window - 1
    own = axis_index("tokens") * q.shape[1]
    if earlier is None:
        earlier = Earlier(jnp.zeros((len(kv), reach, kv.shape[2]), kv.dtype), jnp.zeros(len(kv), jnp.int32))
    keys = jnp.concatenate([earlier.keys, kv], axis=1)
    keys = jnp.pad(keys, ((0, 0), (0, window), (0, 0)))  # the last chunk may be padded

    def chunk(
        first: Int[Array, ""], q: Float[Array, "B Q H C"], complete: Int[Array, "B Q"], *chosen: Int[Array, "B Q k"]
    ) -> Float[Array, "B Q H C"]:
        queries, first = q.shape[1], own + first
        near = lax.dynamic_slice_in_dim(keys, first, reach + queries, axis=1)
        token = jnp.arange(reach + queries) - reach  # of each key, counted from the chunk's first query
        inside = window_mask(jnp.arange(queries)[:, None] - token, window)
        inside &= (first + token >= -earlier.tokens[:, None])[:, None]
        count = entries.values.shape[1]
        visible = chosen_mask(chosen[0], count) if chosen else entry_mask(complete, count)
        attention = attend_as_released if numerics.release else attend
        kv = jnp.concatenate([near, entries.values], axis=1)
        return attention(q, kv, jnp.concatenate([inside, visible], axis=2), sink)

    chosen = () if entries.chosen is None else (entries.chosen,)
    return map_query_chunks(chunk, window, q, entries.complete, *chosen)


def window_mask(distance: Int[Array, "Q X"], window: int) -> Bool[Array, "Q X"]:
    """Keys that a query sees: its own token and the ``window - 1`` before; ``distance``: tokens from key to query."""
    return (distance >= 0) & (distance < window)


def complete_blocks(token: Int[Array, "B S"], ratio: int) -> Int[Array, "B S"]:
    """How many blocks are complete once a token is seen; ``token`` is its index in its prompt."""
    return (token + 1) // ratio


def attend(
    q: Float[Array, "B S H C"], kv: Float[Array, "B X C"], seen: Bool[Array, "B S X"], sink: Float[Array, " H"]
) -> Float[Array, "B S H C"]:
    """Softmax attention over keys that are also the values, with a learned sink per head.

    o_sh = sum_x p_shx kv_x with p_shx = exp(a_shx) / (exp(sink_h) + sum_y exp(a_shy)), a_shx = q_sh . kv_x / sqrt(C)
    over the keys x that query s sees. Scores, softmax and the sum over values are computed in float32; p is rounded to
    the dtype of ``kv``.
    """
    scores, sinks = _scores(q, kv, seen), sink.astype(jnp.float32)[:, None]
    peak = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks)
    weights = jnp.exp(scores - peak)
    shares = weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - peak))
    return einsum_f32("bshx,bxc->bshc", shares.astype(kv.dtype), kv).astype(q.dtype)


def attend_as_released(
    q: Float[Array, "B S H C"], kv: Float[Array, "B X C"], seen: Bool[Array, "B S X"], sink: Float[Array, " H"]
) -> Float[Array, "B S H C"]:
    """:func:`attend` as a release rounds: exp(a - max a) before the division by the sum, which then divides the sum."""
    scores, sinks = _scores(q, kv, seen), sink.astype(jnp.float32)[:, None]
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - peak)
    rounded = round_to(weights, kv.dtype)
    return (einsum_f32("bshx,bxc->bshc", rounded, kv) / total).astype(q.dtype)


def _scores(
    q: Float[Array, "B S H C"], kv: Float[Array, "B X C"], seen: Bool[Array, "B S X"]
) -> Float[Array, "B S H X"]:
    # Heads stay behind the queries: with one key for all heads this is one large matmul, and nothing is transposed.
    scores = einsum_f32("bshc,bxc->bshx", q, kv) * q.shape[-1] ** -0.5
    return jnp.where(seen[:, :, None], scores, -jnp.inf)


def _grouped_linear(x: Float[Array, "B S G I"], w: Float[Array, "G I O"]) -> Float[Array, "B S G O"]:
    """Multiply every group of heads with its own matrix."""
    return einsum_f32("bsgi,gio->bsgo", x, w.astype(x.dtype)).astype(x.dtype)
