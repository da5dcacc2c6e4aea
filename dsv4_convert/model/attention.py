"""Attention of one layer: a sliding window, and beside it the compressed past (paper section 2.3).

Shape letters: ``B`` batch, ``S`` tokens, ``T`` compressed entries, ``D`` model width, ``R`` query rank, ``H`` heads,
``C`` head width. ``G`` output groups, ``I`` and ``O`` input and output width of one group. ``Q`` queries of a chunk,
``X`` keys, ``N`` tokens that the windows of a chunk reach, ``K`` tokens of a call, ``P`` tokens before, ``k`` chosen
entries.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsv4_convert.model.axes import axis_index, shard_map
from dsv4_convert.model.cache import Compressed, LayerCache, Past, latest
from dsv4_convert.model.compressor import Compressor
from dsv4_convert.model.encoded import Encoded, product
from dsv4_convert.model.indexer import Indexer, chosen_mask, entry_mask
from dsv4_convert.model.norm import rms_norm
from dsv4_convert.model.numerics import Numerics
from dsv4_convert.model.ops import einsum_f32, map_query_chunks, parameter, round_then_f32
from dsv4_convert.model.recording import Taps
from dsv4_convert.model.rope import frequencies, rotate
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.v4.config import V4Config
from dsv4_convert.spec.v4.kinds import AttentionKind

#: Entries for each chosen one from which a query's chosen entries are gathered instead of masking the others
#: (``python -m benchmarks.sparse_attention``).
GATHER_FROM = 2
#: Entries that are gathered at a time, for all queries of a chunk: at V4-Flash's width 8 MiB in bfloat16.
GATHERED_ROWS = 8192
#: Keys that the published kernel takes at a time.
KERNEL_KEYS = 64

#: Keys that are values too: those of all queries ``[B, X, C]``, or each query's own ``[B, S, X, C]``. A query meets the
#: keys of all parts, one part after the other.
Keys = tuple[Float[Array, "B ... C"], ...]


class Earlier(NamedTuple):
    """Keys of the ``window - 1`` tokens before a call, and how many tokens there were in all."""

    keys: Float[Array, "B P C"]
    tokens: Int[Array, " B"]


class Entries(NamedTuple):
    """The compressed past: entries, the number that each query may see, and its choice among these (None: all).

    ``slot``: where the entries begin in the published kernel's list of keys, after the places of the window.
    """

    values: Float[Array, "B T C"]
    complete: Int[Array, "B S"]
    chosen: Int[Array, "B S k"] | None
    slot: Int[Array, " B"]


class WindowedAttention(nnx.Module):
    """Multi-query attention whose single key head is also its value, over a sliding window and compressed entries.

    1. q = q_norm(x wq_a) wq_b per head, kv = kv_norm(x wkv).
    2. A query sees the last ``sliding_window`` tokens, itself included, and compressed entries of complete blocks.
    3. One softmax over both, with a learned sink per head in the denominator; scores scaled by C^-0.5.
    4. The context is rotated back by the query's position, since values carry the keys' rotation.
    5. Each of G groups of heads has its own low-rank matrix ``wo_a``; all groups share ``wo_b``.

    A subclass says how queries are normed, and where the compressed entries come from.
    Source: paper section 2.3; published inference code, ``Attention``.
    """

    def __init__(self, config: Config, numerics: Numerics) -> None:
        self.config = config
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

    def _low_rank(self, x: Float[Array, "B S D"], taps: Taps) -> Float[Array, "B S R"]:
        """The low-rank queries, of which the indexer makes its queries too."""
        projected = taps("wq_a", self.numerics.linear(x, self.wq_a.get_value()))
        return taps("q_norm", rms_norm(projected, self.q_norm[...], self.config.rms_norm_eps))

    def _queries(self, low_rank: Float[Array, "B S R"], taps: Taps) -> Float[Array, "B S H C"]:
        """The queries of all heads, not rotated."""
        q = self.numerics.linear(low_rank, self.wq_b.get_value())
        return taps("wq_b", q.reshape(*low_rank.shape[:2], self.config.num_attention_heads, self.config.head_dim))

    def _keys(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"], table: np.ndarray, taps: Taps
    ) -> Float[Array, "B S C"]:
        """The rotated keys of the tokens, which are their values too."""
        projected = taps("wkv", self.numerics.linear(x, self.wkv.get_value()))
        kv = taps("kv_norm", rms_norm(projected, self.kv_norm[...], self.config.rms_norm_eps))
        return taps("kv_rope", self.numerics.key(rotate(kv, positions, table), 2 * len(table)))

    def _attended(
        self,
        q: Float[Array, "B S H C"],
        kv: Float[Array, "B S C"],
        entries: Entries,
        positions: Int[Array, "B S"],
        table: np.ndarray,
        taps: Taps,
        past: Past[Any] | None,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B P C"] | None]:
        """The output for rotated queries and keys; with a ``past`` the keys that later windows reach too."""
        batch, tokens, *_ = q.shape
        earlier = None if past is None else Earlier(past.cache.window, past.before)
        window, numerics = self.config.sliding_window, self.numerics
        context = taps("context", self._gathered(q, kv, earlier, entries))
        context = taps("context_unrotated", rotate(context, positions, table, inverse=True))
        grouped = context.reshape(batch, tokens, self.config.o_groups, -1)
        low_rank = taps("wo_a", _grouped_linear(grouped, self.wo_a.get_value()))
        output = taps("wo_b", numerics.linear(low_rank.reshape(batch, tokens, -1), self.wo_b.get_value()))
        if past is None:
            return output, None
        return output, latest(jnp.concatenate([past.cache.window, kv], axis=1), past.kept, window - 1)

    def _gathered(
        self, q: Float[Array, "B S H C"], kv: Float[Array, "B S C"], earlier: Earlier | None, entries: Entries
    ) -> Float[Array, "B S H C"]:
        """The values that every query gathers, from its window and the compressed entries."""
        window, sink = self.config.sliding_window, self.attn_sink[...]
        return _context(q, kv, earlier, entries, sink, window=window, numerics=self.numerics)

    def _slots(self, batch: int, tokens: int, past: Past[Any] | None) -> Int[Array, " B"]:
        """Where entries begin in the published kernel's list of keys (:class:`Entries`)."""
        window = self.config.sliding_window
        if past is None:
            return jnp.full(batch, min(tokens, window))
        # A prompt that goes on has all places of its window, whether there are tokens for them.
        return jnp.where(past.before == 0, jnp.minimum(past.count, window), window)


class Attention(WindowedAttention):
    """Attention of DeepSeek-V4: every layer compresses its own past.

    Queries are normed per head: q = unit_rms(q). A query sees all entries of complete blocks (HCA) or the indexer's
    choice (CSA).
    """

    def __init__(self, config: V4Config, kind: AttentionKind, numerics: Numerics) -> None:
        super().__init__(config, numerics)
        self.kind = kind
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
        batch, tokens, _ = x.shape
        table = frequencies(self.config, compressed=self.kind is not AttentionKind.SLIDING)
        q_low_rank = self._low_rank(x, taps)
        q = taps("q", self.numerics.query(self._queries(q_low_rank, taps), self.config.rms_norm_eps))
        q = taps("q_rope", rotate(q, positions, table))
        kv = self._keys(x, positions, table, taps)

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

        past_entries = Entries(entries, complete, chosen, self._slots(batch, tokens, past))
        output, window = self._attended(q, kv, past_entries, positions, table, taps, past)
        return output, None if window is None else LayerCache(window, compressed, indexed)

    def compressors(self, cache: LayerCache) -> Iterator[tuple[str, Compressor, Compressed]]:
        """Its compressors, by the names that their states have among the taps, with these states."""
        if self.compressor is not None and cache.compressor is not None:
            yield "compressor", self.compressor, cache.compressor
        if self.indexer is not None and cache.indexer is not None:
            yield "indexer", self.indexer.compressor, cache.indexer


def _compressor(config: V4Config, kind: AttentionKind, numerics: Numerics) -> Compressor | None:
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
    window. Where entries outnumber the chosen ones, each query meets those that it chose and no others, so its cost
    does not grow with the entries.

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
    count, longest = entries.values.shape[1], window
    gathered = False
    if entries.chosen is not None and count:
        chosen_each = entries.chosen.shape[2]
        gathered = numerics.release or gathers(count, chosen_each)
        longest = min(window, max(1, GATHERED_ROWS // (len(q) * chosen_each))) if gathered else window

    def chunk(
        first: Int[Array, ""], q: Float[Array, "B Q H C"], complete: Int[Array, "B Q"], *chosen: Int[Array, "B Q k"]
    ) -> Float[Array, "B Q H C"]:
        queries, first = q.shape[1], own + first
        near = lax.dynamic_slice_in_dim(keys, first, reach + queries, axis=1)
        query, token = jnp.arange(queries), jnp.arange(reach + queries) - reach  # counted from the chunk's first query
        inside = window_mask(query[:, None] - token, window)
        inside &= (first + token >= -earlier.tokens[:, None])[:, None]
        seen: Keys
        if gathered:
            seen, visible = (near, chosen_rows(entries.values, chosen[0])), chosen_seen(chosen[0])
        else:
            seen = (jnp.concatenate([near, entries.values], axis=1),)
            visible = chosen_mask(chosen[0], count) if chosen else entry_mask(complete, count)
        mask = jnp.concatenate([inside, visible], axis=2)
        if not numerics.release:
            return attend(q, seen, mask, sink)
        before = earlier.tokens[:, None] + first
        places = window_places(before + query, before + token, window)
        places = jnp.concatenate([places, _entry_places(entries.slot, visible)], axis=2)
        return attend_as_released(q, seen, mask, sink, places // KERNEL_KEYS)

    chosen = () if entries.chosen is None else (entries.chosen,)
    return map_query_chunks(chunk, longest, q, entries.complete, *chosen)


def gathers(entries: int, chosen: int) -> bool:
    """Whether queries that choose among so many entries gather those, instead of masking the others."""
    return entries > GATHER_FROM * chosen


def chosen_rows(values: Float[Array, "B T C"], chosen: Int[Array, "B Q k"]) -> Float[Array, "B Q k C"]:
    """The entries that each query has chosen; for none, the first."""
    index = jnp.clip(chosen, 0, values.shape[1] - 1)
    return jax.vmap(lambda rows, own: rows.at[own].get(mode="promise_in_bounds"))(values, index)


def chosen_seen(chosen: Int[Array, "B Q k"]) -> Bool[Array, "B Q k"]:
    """The gathered rows that are a choice, and none of those that stand for no entry."""
    return chosen >= 0


def window_mask(distance: Int[Array, "Q X"], window: int) -> Bool[Array, "Q X"]:
    """Keys that a query sees: its own token and the ``window - 1`` before; ``distance``: tokens from key to query."""
    return (distance >= 0) & (distance < window)


def complete_blocks(token: Int[Array, "B S"], ratio: int) -> Int[Array, "B S"]:
    """How many blocks are complete once a token is seen; ``token`` is its index in its prompt."""
    return (token + 1) // ratio


def window_places(query: Int[Array, "B Q"], token: Int[Array, "B N"], window: int) -> Int[Array, "B Q N"]:
    """The place of each token in the published kernel's list of a query's keys, which begins with its window.

    ``query`` and ``token`` are indices in the prompt. A window that reaches further back begins with token 0.
    """
    return token[:, None] - jnp.maximum(query - window + 1, 0)[..., None]


def _entry_places(slot: Int[Array, " B"], visible: Bool[Array, "B Q T"]) -> Int[Array, "B Q T"]:
    """The places of the entries, behind those of the window."""
    return jnp.broadcast_to(slot[:, None, None] + jnp.arange(visible.shape[2]), visible.shape)


def attend(
    q: Float[Array, "B S H C"], kv: Keys, seen: Bool[Array, "B S X"], sink: Float[Array, " H"]
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
    return _weighted_sum(shares.astype(kv[0].dtype), kv).astype(q.dtype)


def attend_as_released(
    q: Float[Array, "B S H C"],
    kv: Keys,
    seen: Bool[Array, "B S X"],
    sink: Float[Array, " H"],
    block: Int[Array, "B S X"],
) -> Float[Array, "B S H C"]:
    """:func:`attend` as a release rounds.

    Its kernel takes the keys block by block. It rounds exp(a - m), where m is the largest score up to the end of the
    key's block, and divides by the sum after the sum over values. ``block``: the block of each key.

    Source: published inference code, ``sparse_attn_kernel`` in kernel.py.
    """
    scores, sinks = _scores(q, kv, seen), sink.astype(jnp.float32)[:, None]
    peak = jnp.max(scores, axis=-1, keepdims=True)
    peaks = _running_peaks(scores, block, -(-scores.shape[-1] // KERNEL_KEYS))
    weights = jnp.where(seen[:, :, None], jnp.exp(scores - peaks), 0)
    shrink = jnp.exp(peaks - peak)
    total = jnp.sum(weights * shrink, axis=-1, keepdims=True) + jnp.exp(sinks - peak)
    rounded = round_then_f32(weights.astype(kv[0].dtype)) * shrink
    return (_weighted_sum(rounded, kv) / total).astype(q.dtype)


def _running_peaks(scores: Float[Array, "B S H X"], block: Int[Array, "B S X"], blocks: int) -> Float[Array, "B S H X"]:
    """For each key the largest score of the keys in its block and those before."""

    def step(peak: Float[Array, "B S H"], index: Int[Array, ""]) -> tuple[Array, Array]:
        peak = jnp.maximum(peak, jnp.max(jnp.where((block == index)[:, :, None], scores, -jnp.inf), axis=-1))
        return peak, peak

    _, running = lax.scan(step, jnp.full(scores.shape[:3], -jnp.inf), jnp.arange(blocks))
    index = jnp.clip(block, 0, blocks - 1)[:, :, None]
    return jnp.take_along_axis(jnp.moveaxis(running, 0, -1), index, axis=-1)


def _scores(q: Float[Array, "B S H C"], kv: Keys, seen: Bool[Array, "B S X"]) -> Float[Array, "B S H X"]:
    # Heads stay behind the queries: with one key for all heads this is one large matmul, and nothing is transposed.
    parts = [einsum_f32("bshc,bxc->bshx" if part.ndim == 3 else "bshc,bsxc->bshx", q, part) for part in kv]
    scores = jnp.concatenate(parts, axis=-1) * q.shape[-1] ** -0.5
    return jnp.where(seen[:, :, None], scores, -jnp.inf)


def _weighted_sum(shares: Float[Array, "B S H X"], kv: Keys) -> Float[Array, "B S H C"]:
    """The values of all parts times their shares, summed in float32."""
    ends = list(itertools.accumulate(part.shape[-2] for part in kv))
    split = jnp.split(shares, ends[:-1], axis=-1)
    sums = [
        einsum_f32("bshx,bxc->bshc" if part.ndim == 3 else "bshx,bsxc->bshc", own, part)
        for own, part in zip(split, kv, strict=True)
    ]
    return functools.reduce(jnp.add, sums)


def _grouped_linear(x: Float[Array, "B S G I"], w: Float[Array | Encoded, "G I O"]) -> Float[Array, "B S G O"]:
    """Multiply every group of heads with its own matrix."""
    return product(x, w, x.dtype).astype(x.dtype)
