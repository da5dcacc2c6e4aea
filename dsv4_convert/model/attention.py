"""Attention of one layer: a sliding window, and beside it the compressed past (paper section 2.3).

Shape letters: ``B`` batch, ``S`` tokens, ``T`` compressed entries, ``D`` model width, ``R`` query rank, ``H`` heads,
``C`` head width, ``G`` output groups, ``I`` and ``O`` input and output width of one group, ``Q`` queries of a run,
``X`` keys, ``K`` tokens of a call, ``P`` tokens before.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsv4_convert.model.axes import on_shards, place
from dsv4_convert.model.cache import LayerCache, Past, latest
from dsv4_convert.model.compressor import Compressor
from dsv4_convert.model.indexer import Indexer, chosen_mask, entry_mask
from dsv4_convert.model.norm import rms_norm
from dsv4_convert.model.numerics import Numerics, once
from dsv4_convert.model.parameters import contract, parameter
from dsv4_convert.model.recording import Taps
from dsv4_convert.model.rope import frequencies, rotate
from dsv4_convert.model.runs import by_runs
from dsv4_convert.spec.config import AttentionKind, Config

#: Logical axes of what :func:`_context` takes and gives.
_CONTEXT_TAKES = (
    "batch tokens heads -",
    "batch - -",
    "batch - -",
    "batch",
    "batch - -",
    "batch tokens",
    "batch tokens -",
    "heads",
)
_CONTEXT_GIVES = _CONTEXT_TAKES[0]


class Attention(nnx.Module):
    """Multi-query attention whose single key head is also its value.

    1. q = unit_rms(q_norm(x wq_a) wq_b) per head, kv = kv_norm(x wkv); both rotated.
    2. A query sees the last ``sliding_window`` tokens, itself included, and the compressed entries of complete blocks:
       all of them (HCA) or the indexer's choice (CSA).
    3. One softmax over both, with a learned sink per head in the denominator; scores scaled by C^-0.5.
    4. The context is turned back by the query's position, since values carry the keys' rotation.
    5. Heads in G groups, each through its own low-rank matrix ``wo_a``, then together through ``wo_b``.
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

        ``positions`` are those of the rotary tables; what a token sees goes by the order of tokens.
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
        entries, compressed, indexed, choice = kv[:, :0], None, None, None
        complete = jnp.zeros((batch, tokens), jnp.int32)
        if self.compressor is not None:
            at = None if past is None else past.of(past.cache.compressor)
            entries, compressed = self.compressor(x, positions, table, taps.within("compressor."), at)
            complete = complete_blocks(before[:, None] + jnp.arange(tokens), self.compressor.ratio)
        if self.indexer is not None:
            at = None if past is None else past.of(past.cache.indexer)
            choice, indexed = self.indexer(x, q_low_rank, positions, complete, table, taps.within("indexer."), at)

        earlier = None if past is None else past.cache.window
        sink, window = self.attn_sink[...], config.sliding_window
        seen = (q, kv, earlier, before, entries, complete, choice, sink)
        attended = partial(_context, window=window, numerics=numerics)
        context = taps("context", on_shards(attended, _CONTEXT_TAKES, _CONTEXT_GIVES, *seen))
        context = taps("context_unrotated", rotate(context, positions, table, inverse=True))
        grouped = context.reshape(batch, tokens, config.o_groups, -1)
        low_rank = taps("wo_a", _grouped_linear(grouped, self.wo_a[...]))
        output = taps("wo_b", numerics.linear(low_rank.reshape(batch, tokens, -1), self.wo_b[...]))
        if past is None:
            return output, None
        kept = latest(jnp.concatenate([past.cache.window, kv], axis=1), past.kept, window - 1)
        return output, LayerCache(kept, compressed, indexed)


def _compressor(config: Config, kind: AttentionKind, numerics: Numerics) -> Compressor | None:
    """CSA's blocks overlap, so each token projects to two series of values; HCA's do not."""
    width = config.head_dim
    if kind is AttentionKind.SLIDING:
        return None
    projected = 2 * width if kind is AttentionKind.CSA else width
    eps = config.rms_norm_eps
    ratio = config.ratio(kind)
    return Compressor(config.hidden_size, width, ratio, projected, eps=eps, indexed=False, numerics=numerics)


def _context(
    q: Float[Array, "B S H C"],
    kv: Float[Array, "B K C"],
    earlier: Float[Array, "B P C"] | None,
    before: Int[Array, " B"],
    entries: Float[Array, "B T C"],
    complete: Int[Array, "B S"],
    choice: Int[Array, "B S k"] | None,
    sink: Float[Array, " H"],
    *,
    window: int,
    numerics: Numerics,
) -> Float[Array, "B S H C"]:
    """What every query sees: of the tokens those in its window, then entries.

    In runs of queries, each with the keys that its window reaches: cost does not grow as S squared for the window, and
    memory does not for the entries.

    Args:
        q, kv: queries, and keys that are also values, of the tokens of this call. Where the call's tokens are split
            over devices, the queries are this one's part of them; the keys, one head in all, are whole everywhere.
        earlier: keys of the ``window - 1`` tokens before, of which there were ``before`` in all; None if none were.
        entries, complete: compressed entries, and how many of them each query may see.
        choice: the entries that it does see (:func:`~dsv4_convert.model.indexer.choose`); None for all of those.
        sink, window, numerics: of the layer.
    """
    reach = min(window, kv.shape[1]) - 1 if earlier is None else window - 1
    own = place("tokens") * q.shape[1]
    if earlier is None:
        earlier = jnp.zeros((len(kv), reach, kv.shape[2]), kv.dtype)
    keys = jnp.pad(jnp.concatenate([earlier, kv], axis=1), ((0, 0), (0, window), (0, 0)))  # the last run may be padded

    def run(
        first: Int[Array, ""], q: Float[Array, "B Q H C"], complete: Int[Array, "B Q"], *choice: Int[Array, "B Q k"]
    ) -> Float[Array, "B Q H C"]:
        queries, first = q.shape[1], own + first
        near = lax.dynamic_slice_in_dim(keys, first, reach + queries, axis=1)
        token = jnp.arange(reach + queries) - reach  # of each key, from the run's first query on
        inside = window_mask(jnp.arange(queries)[:, None] - token, window)
        seen = [inside & (first + token >= -before[:, None])[:, None]]
        seen += [chosen_mask(chosen, entries.shape[1]) for chosen in choice] or [entry_mask(complete, entries.shape[1])]
        attention = attend_as_released if numerics.release else attend
        return attention(q, jnp.concatenate([near, entries], axis=1), jnp.concatenate(seen, axis=2), sink)

    return by_runs(run, window, q, complete, *(() if choice is None else (choice,)))


def window_mask(distance: Int[Array, "Q X"], window: int) -> Bool[Array, "Q X"]:
    """Which keys a query sees, by the number of tokens that it is after them: itself and the ``window - 1`` before."""
    return (distance >= 0) & (distance < window)


def complete_blocks(token: Int[Array, "B S"], ratio: int) -> Int[Array, "B S"]:
    """How many blocks are complete at a token, itself included, by its index in its prompt."""
    return (token + 1) // ratio


def attend(
    q: Float[Array, "B S H C"], kv: Float[Array, "B X C"], seen: Bool[Array, "B S X"], sink: Float[Array, " H"]
) -> Float[Array, "B S H C"]:
    """Softmax attention over keys that are also the values, with a sink per head that adds to the denominator only.

    Scores, softmax and the sum over values in float32; the probabilities are rounded to the dtype of ``kv``.
    """
    scores, sinks = _scores(q, kv, seen), sink.astype(jnp.float32)[:, None]
    peak = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks)
    weights = jnp.exp(scores - peak)
    shares = weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - peak))
    return contract("bshx,bxc->bshc", shares.astype(kv.dtype), kv).astype(q.dtype)


def attend_as_released(
    q: Float[Array, "B S H C"], kv: Float[Array, "B X C"], seen: Bool[Array, "B S X"], sink: Float[Array, " H"]
) -> Float[Array, "B S H C"]:
    """:func:`attend` in the release's order of rounding: before the division by the sum, relative to the best key."""
    scores, sinks = _scores(q, kv, seen), sink.astype(jnp.float32)[:, None]
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - peak)
    rounded = once(weights.astype(kv.dtype))
    return (contract("bshx,bxc->bshc", rounded, kv) / total).astype(q.dtype)


def _scores(
    q: Float[Array, "B S H C"], kv: Float[Array, "B X C"], seen: Bool[Array, "B S X"]
) -> Float[Array, "B S H X"]:
    # Heads stay behind the queries: with one key for all heads this is one large matmul, and nothing is transposed.
    scores = contract("bshc,bxc->bshx", q, kv) * q.shape[-1] ** -0.5
    return jnp.where(seen[:, :, None], scores, -jnp.inf)


def _grouped_linear(x: Float[Array, "B S G I"], w: Float[Array, "G I O"]) -> Float[Array, "B S G O"]:
    """Every group of heads through its own matrix."""
    return contract("bsgi,gio->bsgo", x, w.astype(x.dtype)).astype(x.dtype)
