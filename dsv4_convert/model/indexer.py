"""The lightning indexer of CSA layers: which compressed entries a query attends to (paper section 2.3.1).

Shape letters: ``B`` batch, ``S`` queries, ``T`` compressed entries, ``D`` model width, ``R`` query rank, ``H`` indexer
heads, ``C`` indexer head width, ``k`` chosen entries.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsv4_convert.model.axes import on_shards, summed
from dsv4_convert.model.cache import Compressed, Past
from dsv4_convert.model.compressor import Compressor
from dsv4_convert.model.numerics import Numerics, widened
from dsv4_convert.model.parameters import contract, linear, parameter
from dsv4_convert.model.recording import Taps
from dsv4_convert.model.rope import rotate
from dsv4_convert.model.runs import by_runs
from dsv4_convert.spec.config import Config


class Indexer(nnx.Module):
    """Scores every compressed entry for every query with its own, narrower compressor, and keeps the best.

    score(t, b) = sum_h w_h(t) relu(q_h(t) . k_b) / sqrt(C H). Source: paper equations 13-17.
    """

    def __init__(self, config: Config, numerics: Numerics) -> None:
        self.numerics = numerics
        self.heads, self.head_dim, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.longest_run = config.sliding_window
        self.wq_b = parameter("rank index_heads", config.q_lora_rank, self.heads * self.head_dim)
        self.weights_proj = parameter("width index_heads", config.hidden_size, self.heads)
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
        """The chosen entries of each query, ascending, padded with -1 (none) where fewer are there than chosen.

        ``complete`` is the number of entries that each query may choose from. In runs of queries: the scores of all of
        them are in memory at once only where they are recorded.
        """
        keys, compressed = self.compressor(x, positions, table, taps.within("compressor."), past)
        q = self.numerics.linear(q_low_rank, self.wq_b[...]).reshape(*x.shape[:2], self.heads, self.head_dim)
        q = taps("q_rope", self.numerics.indexed(rotate(q, positions, table)))
        weights = taps("weights_proj", linear(x, self.weights_proj[...]))

        def score(keys: Array, first: Array, q: Array, weights: Array) -> Array:
            scores = summed(self._scores(q, keys, weights), "index_heads")
            # In release numerics the sum over all heads is rounded, not that of a device's own.
            scores = scores.astype(q.dtype) if self.numerics.release else scores
            return jax.lax.optimization_barrier(scores)

        def pick(first: Array, scores: Array, complete: Array) -> Array:
            return choose(scores, entry_mask(complete, scores.shape[2]), self.topk)

        def both(keys: Array, first: Array, q: Array, weights: Array, complete: Array) -> Array:
            return pick(first, score(keys, first, q, weights), complete)

        def scored(keys: Array, *rows: Array) -> Array:
            return by_runs(partial(score, keys), self.longest_run, *rows)

        def picked(scores: Array, complete: Array) -> Array:
            return by_runs(pick, self.longest_run, scores, complete)

        def chosen_at_once(keys: Array, *rows: Array) -> Array:
            return by_runs(partial(both, keys), self.longest_run, *rows)

        rows = ("batch tokens index_heads -", "batch tokens index_heads", "batch tokens")
        if taps.uses("scores"):
            scores = taps("scores", on_shards(scored, ("batch - -", *rows[:2]), "batch tokens -", keys, q, weights))
            chosen = on_shards(picked, ("batch tokens -", rows[2]), "batch tokens -", scores, complete)
        else:
            taken = (keys, q, weights, complete)
            chosen = on_shards(chosen_at_once, ("batch - -", *rows), "batch tokens -", *taken)
        return taps("chosen", chosen), compressed

    def _scores(
        self, q: Float[Array, "B S H C"], keys: Float[Array, "B T C"], weights: Float[Array, "B S H"]
    ) -> Float[Array, "B S T"]:
        if self.numerics.release:
            return self._rounded_scores(q, keys, weights)
        affinity = jax.nn.relu(contract("bshc,btc->bsht", q, keys)) * self.head_dim**-0.5
        share = weights.astype(jnp.float32) * self.heads**-0.5
        return jnp.sum(affinity * share[..., None], axis=2)

    def _rounded_scores(
        self, q: Float[Array, "B S H C"], keys: Float[Array, "B T C"], weights: Float[Array, "B S H"]
    ) -> Float[Array, "B S T"]:
        """The same, every step but the sum rounded to the dtype of the activations."""
        dtype = q.dtype
        share = (weights.astype(jnp.float32) * (self.head_dim**-0.5 * self.heads**-0.5)).astype(dtype)
        affinity = widened(jax.nn.relu(contract("bshc,btc->bsht", q, keys).astype(dtype)))
        product = widened((affinity * widened(share)[..., None]).astype(dtype))
        return jnp.sum(product, axis=2)


def choose(scores: Float[Array, "B S T"], visible: Bool[Array, "*B S T"], topk: int) -> Int[Array, "B S k"]:
    """The k = min(topk, T) best visible entries per query, ascending, -1 (none) last."""
    entries = scores.shape[-1]
    k = min(topk, entries)
    best, chosen = jax.lax.top_k(jnp.where(visible, scores, -jnp.inf), k)
    # Invisible entries sort behind all others, under a number that no entry has.
    chosen = jnp.sort(jnp.where(jnp.isneginf(best), entries, chosen), axis=-1, stable=False)
    return jnp.where(chosen == entries, -1, chosen).astype(jnp.int32)


def entry_mask(complete: Int[Array, "B S"], entries: int) -> Bool[Array, "B S T"]:
    """Per query, which of the ``entries`` are of complete blocks."""
    return jnp.arange(entries) < complete[..., None]


def chosen_mask(chosen: Int[Array, "B S k"], entries: int) -> Bool[Array, "B S T"]:
    """Per query, which of the ``entries`` were chosen."""
    batch, queries, _ = chosen.shape
    slots = jnp.where(chosen < 0, entries, chosen)  # one extra slot swallows "none"
    b, s = jnp.arange(batch)[:, None, None], jnp.arange(queries)[None, :, None]
    return jnp.zeros((batch, queries, entries + 1), bool).at[b, s, slots].set(True)[..., :entries]
