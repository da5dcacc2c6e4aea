"""The indexer of V4.1: which entries of a shared compressed past a query attends to.

Shape letters: ``B`` batch, ``S`` queries, ``T`` compressed entries, ``D`` model width, ``R`` query rank, ``Hi``
indexer heads, ``C`` indexer head width, ``W`` width of a latent, ``k`` chosen entries, ``X`` blocks of entries, ``c``
candidate blocks.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsv4_convert.model.axes import shard_map
from dsv4_convert.model.indexer import EntryScorer, choose, chosen_mask, entry_mask
from dsv4_convert.model.norm import rms_norm
from dsv4_convert.model.numerics import Numerics
from dsv4_convert.model.ops import linear, map_query_chunks, parameter
from dsv4_convert.model.recording import Taps
from dsv4_convert.model.rope import rotate
from dsv4_convert.spec.v41.config import V41Config
from dsv4_convert.spec.v41.kinds import Candidates, LayerKind


class SharedIndexer(EntryScorer):
    """Chooses entries for this layer and those after it, up to the next one with an indexer.

    Index keys are ``k_norm(latent wk)``, rotated, made in the layers with a compressor and read by the others.

    The candidate source divides the entries into blocks, whose score is that of their best entry. It nominates the best
    blocks for the layers after it, always with the block of the newest entry, which older blocks could outscore.
    The layers after it choose among the entries of these blocks. Only these: where the candidates hold fewer visible
    entries than a query may choose, the published code fills up with entries outside them. With the released sizes the
    candidates always hold enough.

    Source: published inference code of V4.1, ``Indexer`` and ``select_candidate_blocks``.
    """

    def __init__(self, config: V41Config, kind: LayerKind, numerics: Numerics) -> None:
        super().__init__(config, numerics)
        self.eps = config.rms_norm_eps
        self.candidates = kind.candidates
        self.candidate_blocks, self.candidate_size = config.candidate_topk_blocks, config.candidate_block_size
        self.wk = parameter("key entry", config.head_dim, self.head_dim) if kind.compresses else None
        self.k_norm = parameter("entry", self.head_dim) if kind.compresses else None

    def keys(
        self, latents: Float[Array, "B T W"], start: Int[Array, "B T"], table: np.ndarray, taps: Taps
    ) -> Float[Array, "B T C"]:
        """The index keys of latents whose blocks begin at the positions ``start``."""
        assert self.wk is not None
        assert self.k_norm is not None
        normed = rms_norm(taps("wk", linear(latents, self.wk[...])), self.k_norm[...], self.eps)
        return taps("keys", self.numerics.indexed(rotate(taps("k_norm", normed), start, table)))

    def __call__(
        self,
        x: Float[Array, "B S D"],
        q_low_rank: Float[Array, "B S R"],
        keys: Float[Array, "B T C"],
        complete: Int[Array, "B S"],
        candidates: Int[Array, "B S c"] | None,
        positions: Int[Array, "B S"],
        table: np.ndarray,
        taps: Taps,
    ) -> tuple[Int[Array, "B S k"], Int[Array, "B S c"] | None]:
        """Chosen entries and candidate blocks of each query, ascending, padded with -1 where there are fewer.

        ``complete`` is the number of entries that each query may choose from. ``candidates`` are those of an earlier
        layer; the candidate source returns its own.
        """
        q = self._queries(q_low_rank, positions, table, taps)
        weights = self._weights(x, taps)
        inside = candidates if self.candidates is Candidates.USER else None
        if taps.uses("scores"):
            # The scores of all chunks are in memory at once only where they are recorded.
            scores = taps("scores", self._score_all(keys, q, weights))
            chosen, nominated = self._choose_all(scores, complete, inside)
        else:
            chosen, nominated = self._score_and_choose(keys, q, weights, complete, inside)
        if nominated is not None:
            candidates = taps("candidates", nominated)
        return taps("chosen", chosen), candidates

    @shard_map()
    def _choose_all(
        self, scores: Float[Array, "B S T"], complete: Int[Array, "B S"], inside: Int[Array, "B S c"] | None
    ) -> tuple[Int[Array, "B S k"], Int[Array, "B S c"] | None]:
        given = () if inside is None else (inside,)
        return map_query_chunks(lambda _, *chunk: self._choose(*chunk), self.longest_chunk, scores, complete, *given)

    @shard_map()
    def _score_and_choose(
        self,
        keys: Float[Array, "B T C"],
        q: Float[Array, "B S Hi C"],
        weights: Float[Array, "B S Hi"],
        complete: Int[Array, "B S"],
        inside: Int[Array, "B S c"] | None,
    ) -> tuple[Int[Array, "B S k"], Int[Array, "B S c"] | None]:
        def chunk(_: Array, q: Array, weights: Array, *rest: Array) -> tuple[Array, Array | None]:
            return self._choose(self._summed_scores(keys, q, weights), *rest)

        given = () if inside is None else (inside,)
        return map_query_chunks(chunk, self.longest_chunk, q, weights, complete, *given)

    def _choose(
        self, scores: Float[Array, "B S T"], complete: Int[Array, "B S"], inside: Int[Array, "B S c"] | None = None
    ) -> tuple[Int[Array, "B S k"], Int[Array, "B S c"] | None]:
        entries = scores.shape[2]
        visible = entry_mask(complete, entries)
        nominated = self._nominate(scores, visible, complete) if self.candidates is Candidates.SOURCE else None
        if inside is not None:
            visible &= block_mask(inside, self.candidate_size, entries)
        return choose(scores, visible, self.topk), nominated

    def _nominate(
        self, scores: Float[Array, "B S T"], visible: Bool[Array, "B S T"], complete: Int[Array, "B S"]
    ) -> Int[Array, "B S c"]:
        """The candidate blocks of each query."""
        best = block_scores(jnp.where(visible, scores, -jnp.inf), self.candidate_size)
        newest = (complete[..., None] - 1) // self.candidate_size
        best = jnp.where(jnp.arange(best.shape[2]) == newest, jnp.inf, best)
        return choose(best, jnp.ones_like(best, bool), self.candidate_blocks)


def block_scores(scores: Float[Array, "B S T"], size: int) -> Float[Array, "B S X"]:
    """The largest score in each block of ``size`` entries; the last block may have fewer."""
    padded = jnp.pad(scores, ((0, 0), (0, 0), (0, -scores.shape[2] % size)), constant_values=-jnp.inf)
    return jnp.max(padded.reshape(*scores.shape[:2], -1, size), axis=3)


def block_mask(blocks: Int[Array, "B S c"], size: int, entries: int) -> Bool[Array, "B S T"]:
    """The ``entries`` in the given blocks of ``size``."""
    inside = chosen_mask(blocks, -(-entries // size))
    return jnp.repeat(inside, size, axis=2, total_repeat_length=inside.shape[2] * size)[..., :entries]
