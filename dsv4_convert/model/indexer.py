"""The lightning indexer of CSA layers: which compressed entries a query attends to (paper section 2.3.1).

Shape letters: ``B`` batch, ``S`` queries, ``T`` compressed entries, ``D`` model width, ``R`` query rank, ``Hi``
indexer heads, ``C`` indexer head width, ``k`` chosen entries.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsv4_convert.model.axes import psum, shard_map
from dsv4_convert.model.cache import Compressed, Past
from dsv4_convert.model.compressor import Compressor
from dsv4_convert.model.numerics import Numerics
from dsv4_convert.model.ops import einsum_f32, linear, map_query_chunks, parameter, round_then_f32
from dsv4_convert.model.recording import Taps
from dsv4_convert.model.rope import rotate
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.v4.config import V4Config


class EntryScorer(nnx.Module):
    """Scores compressed entries for every query.

    The score of entry b for token t is sum_h w_h(t) relu(q_h(t) . k_b) / sqrt(C H). Token t has a query q_h and a
    weight w_h in each of H indexer heads, and k_b is the key of entry b, which a subclass makes.

    Source: paper equations 13-17; published inference code, ``Indexer``.
    """

    def __init__(self, config: Config, numerics: Numerics) -> None:
        self.numerics = numerics
        self.heads, self.head_dim, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.longest_chunk = config.sliding_window
        self.wq_b = parameter("rank index_heads", config.q_lora_rank, self.heads * self.head_dim)
        self.weights_proj = parameter("width index_heads", config.hidden_size, self.heads)

    def _queries(
        self, q_low_rank: Float[Array, "B S R"], positions: Int[Array, "B S"], table: np.ndarray, taps: Taps
    ) -> Float[Array, "B S Hi C"]:
        """The rotated queries of all heads."""
        q = self.numerics.linear(q_low_rank, self.wq_b.get_value()).reshape(
            *q_low_rank.shape[:2], self.heads, self.head_dim
        )
        return taps("q_rope", self.numerics.indexed(rotate(q, positions, table)))

    def _weights(self, x: Float[Array, "B S D"], taps: Taps) -> Float[Array, "B S Hi"]:
        """The weights of all heads, before scaling."""
        return taps("weights_proj", linear(x, self.weights_proj[...]))

    @shard_map()
    def _score_all(
        self, keys: Float[Array, "B T C"], q: Float[Array, "B S Hi C"], weights: Float[Array, "B S Hi"]
    ) -> Float[Array, "B S T"]:
        return map_query_chunks(lambda _, *chunk: self._summed_scores(keys, *chunk), self.longest_chunk, q, weights)

    def _summed_scores(
        self, keys: Float[Array, "B T C"], q: Float[Array, "B S Hi C"], weights: Float[Array, "B S Hi"]
    ) -> Float[Array, "B S T"]:
        scores = psum(self._scores(q, keys, weights), "index_heads")
        # Release numerics round the sum over all heads, not the sum over one device's heads.
        scores = scores.astype(q.dtype) if self.numerics.release else scores
        return jax.lax.optimization_barrier(scores)

    def _scores(
        self, q: Float[Array, "B S Hi C"], keys: Float[Array, "B T C"], weights: Float[Array, "B S Hi"]
    ) -> Float[Array, "B S T"]:
        if self.numerics.release:
            return self._rounded_scores(q, keys, weights)
        affinity = jax.nn.relu(einsum_f32("bshc,btc->bsht", q, keys)) * self.head_dim**-0.5
        share = weights.astype(jnp.float32) * self.heads**-0.5
        return jnp.sum(affinity * share[..., None], axis=2)

    def _rounded_scores(
        self, q: Float[Array, "B S Hi C"], keys: Float[Array, "B T C"], weights: Float[Array, "B S Hi"]
    ) -> Float[Array, "B S T"]:
        """:meth:`_scores` with every step but the sum rounded to the dtype of the activations."""
        dtype = q.dtype
        share = (weights.astype(jnp.float32) * (self.head_dim**-0.5 * self.heads**-0.5)).astype(dtype)
        affinity = round_then_f32(jax.nn.relu(einsum_f32("bshc,btc->bsht", q, keys).astype(dtype)))
        product = round_then_f32((affinity * round_then_f32(share)[..., None]).astype(dtype))
        return jnp.sum(product, axis=2)


class Indexer(EntryScorer):
    """The indexer of CSA layers of DeepSeek-V4: its keys are the entries of its own, narrower compressor."""

    def __init__(self, config: V4Config, numerics: Numerics) -> None:
        super().__init__(config, numerics)
        self.compressor = Compressor(
            config.hidden_size,
            self.head_dim,
            config.csa_ratio,
            2 * self.head_dim,
            eps=config.rms_norm_eps,
            indexed=True,
            numerics=numerics,
        )

    def __call__(
        self,
        x: Float[Array, "B S D"],
        q_low_rank: Float[Array, "B S R"],
        positions: Int[Array, "B S"],
        complete: Int[Array, "B S"],
        table: np.ndarray,
        taps: Taps,
        past: Past[Compressed] | None = None,
    ) -> tuple[Int[Array, "B S k"], Compressed | None]:
        """The chosen entries of each query, padded with -1 where fewer than k may be chosen.

        They are in ascending order. Release numerics have the best first, as the published code does: attention rounds
        in that order. ``complete`` is the number of entries that each query may choose from.
        """
        keys, compressed = self.compressor(x, positions, table, taps.within("compressor."), past)
        q = self._queries(q_low_rank, positions, table, taps)
        weights = self._weights(x, taps)

        if taps.uses("scores") or (self.numerics.release and taps.uses("chosen")):
            # The scores of all chunks are in memory at once only where they are recorded, or order what is recorded.
            scores = taps("scores", self._score_all(keys, q, weights))
            chosen = taps("chosen", self._choose_all(scores, complete))
            return self._order_all(scores, chosen) if self.numerics.release else chosen, compressed
        return taps("chosen", self._score_and_choose(keys, q, weights, complete)), compressed

    @shard_map()
    def _choose_all(self, scores: Float[Array, "B S T"], complete: Int[Array, "B S"]) -> Int[Array, "B S k"]:
        return map_query_chunks(lambda _, *chunk: self._choose(*chunk), self.longest_chunk, scores, complete)

    @shard_map()
    def _order_all(self, scores: Float[Array, "B S T"], chosen: Int[Array, "B S k"]) -> Int[Array, "B S k"]:
        return map_query_chunks(lambda _, *chunk: best_first(*chunk), self.longest_chunk, scores, chosen)

    @shard_map()
    def _score_and_choose(
        self,
        keys: Float[Array, "B T C"],
        q: Float[Array, "B S Hi C"],
        weights: Float[Array, "B S Hi"],
        complete: Int[Array, "B S"],
    ) -> Int[Array, "B S k"]:
        def chunk(_: Array, q: Array, weights: Array, complete: Array) -> Array:
            scores = self._summed_scores(keys, q, weights)
            chosen = self._choose(scores, complete)
            return best_first(scores, chosen) if self.numerics.release else chosen

        return map_query_chunks(chunk, self.longest_chunk, q, weights, complete)

    def _choose(self, scores: Float[Array, "B S T"], complete: Int[Array, "B S"]) -> Int[Array, "B S k"]:
        return choose(scores, entry_mask(complete, scores.shape[2]), self.topk)


def choose(scores: Float[Array, "B S T"], visible: Bool[Array, "*B S T"], topk: int) -> Int[Array, "B S k"]:
    """The k = min(topk, T) best visible entries of each query, ascending, with -1 for none at the end."""
    entries = scores.shape[-1]
    k = min(topk, entries)
    best, chosen = jax.lax.top_k(jnp.where(visible, scores, -jnp.inf), k)
    # Invisible entries sort behind all others, under a number that no entry has.
    chosen = jnp.sort(jnp.where(jnp.isneginf(best), entries, chosen), axis=-1, stable=False)
    return jnp.where(chosen == entries, -1, chosen).astype(jnp.int32)


def best_first(scores: Float[Array, "B S T"], chosen: Int[Array, "B S k"]) -> Int[Array, "B S k"]:
    """Chosen entries in the order of falling scores, with -1 for none at the end."""
    own = jnp.take_along_axis(scores, jnp.maximum(chosen, 0), axis=-1)
    order = jnp.argsort(jnp.where(chosen < 0, jnp.inf, -own), axis=-1)
    return jnp.take_along_axis(chosen, order, axis=-1)


def entry_mask(complete: Int[Array, "B S"], entries: int) -> Bool[Array, "B S T"]:
    """The ``entries`` that each query may see: those of complete blocks."""
    return jnp.arange(entries) < complete[..., None]


def chosen_mask(chosen: Int[Array, "B S k"], entries: int) -> Bool[Array, "B S T"]:
    """The ``entries`` that each query sees: those that it has chosen."""
    batch, queries, _ = chosen.shape
    slots = jnp.where(chosen < 0, entries, chosen)  # one extra slot swallows "none"
    b, s = jnp.arange(batch)[:, None, None], jnp.arange(queries)[None, :, None]
    return jnp.zeros((batch, queries, entries + 1), bool).at[b, s, slots].set(True)[..., :entries]
