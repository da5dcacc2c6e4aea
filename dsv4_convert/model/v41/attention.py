"""Attention of V4.1: the compressed past of a layer belongs to an earlier one, and so may the choice among its entries.

Shape letters: ``B`` batch, ``S`` tokens, ``T`` compressed entries, ``D`` model width, ``R`` query rank, ``C`` head
width, ``Ci`` indexer head width, ``k`` chosen entries, ``c`` candidate blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv4_convert.model.attention import Entries, WindowedAttention, complete_blocks
from dsv4_convert.model.cache import Past, SourceCache, V41LayerCache
from dsv4_convert.model.compressor import written
from dsv4_convert.model.numerics import Numerics
from dsv4_convert.model.recording import Taps
from dsv4_convert.model.rope import frequencies, rotate
from dsv4_convert.model.v41.compressor import LatentCompressor
from dsv4_convert.model.v41.indexer import SharedIndexer
from dsv4_convert.spec.v41.config import V41Config
from dsv4_convert.spec.v41.kinds import LayerKind


class Shared(NamedTuple):
    """Results that attention layers hand down instead of computing them anew; None before the layer that makes them.

    Attributes:
        entries: the compressed past, rotated.
        keys: the index key of each entry.
        chosen: the entries that each query attends to.
        candidates: the blocks of entries that later indexers choose from.
    """

    entries: Float[Array, "B T C"] | None = None
    keys: Float[Array, "B T Ci"] | None = None
    chosen: Int[Array, "B S k"] | None = None
    candidates: Int[Array, "B S c"] | None = None


class SharedAttention(WindowedAttention):
    """Attention of DeepSeek-V4.1.

    Queries are not normed per head. Layers without a compressed past see their window only. The others attend to the
    latest choice among the latest entries: a layer with a compressor makes entries and index keys for itself and the
    layers after it, and a layer with an indexer chooses entries.

    Source: published inference code of V4.1, ``Attention``.
    """

    def __init__(self, config: V41Config, kind: LayerKind, numerics: Numerics) -> None:
        super().__init__(config, numerics)
        self.ratio = kind.ratio
        self.compressor = LatentCompressor(config, kind.ratio, numerics) if kind.compresses else None
        self.indexer = SharedIndexer(config, kind, numerics) if kind.indexes else None

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        shared: Shared,
        taps: Taps,
        past: Past[V41LayerCache] | None = None,
    ) -> tuple[Float[Array, "B S D"], Shared, V41LayerCache | None]:
        """Output, and what the next layers share; with a ``past`` the layer's new state too.

        ``positions`` index the rotary tables; masks go by the order of tokens.
        """
        batch, tokens, _ = x.shape
        table = frequencies(self.config, compressed=self.ratio > 0)
        q_low_rank = self._low_rank(x, taps)
        q = taps("q_rope", rotate(self._queries(q_low_rank, taps), positions, table))
        kv = self._keys(x, positions, table, taps)

        source: SourceCache | None = None
        entries, chosen = kv[:, :0], None
        complete = jnp.zeros((batch, tokens), jnp.int32)
        if self.ratio:
            before = complete[:, :1] if past is None else past.before[:, None]
            complete = complete_blocks(before + jnp.arange(tokens), self.ratio)
            shared, source = self._compress(x, positions, shared, table, taps, past)
            if self.indexer is not None:
                assert shared.keys is not None
                chosen, candidates = self.indexer(
                    *(x, q_low_rank, shared.keys, complete, shared.candidates, positions, table),
                    taps.within("indexer."),
                )
                shared = shared._replace(chosen=chosen, candidates=candidates)
            assert shared.entries is not None
            entries, chosen = shared.entries, shared.chosen

        past_entries = Entries(entries, complete, chosen, self._slots(batch, tokens, past))
        output, window = self._attended(q, kv, past_entries, positions, table, taps, past)
        return output, shared, None if window is None else V41LayerCache(window, source, None)

    def compressors(self, cache: V41LayerCache) -> Iterator[tuple[str, LatentCompressor, SourceCache]]:
        """Its compressor, by the name that its state has among the taps, with this state."""
        if self.compressor is not None and cache.source is not None:
            yield "compressor", self.compressor, cache.source

    def _compress(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        shared: Shared,
        table: np.ndarray,
        taps: Taps,
        past: Past[V41LayerCache] | None,
    ) -> tuple[Shared, SourceCache | None]:
        """Entries and index keys of this layer, if it makes them; with a ``past`` the compressor's state too."""
        if self.compressor is None:
            return shared, None
        assert self.indexer is not None
        at = None if past is None else past.of(past.cache.source)
        latents, pending = self.compressor(x, positions, taps.within("compressor."), at)
        keys = self.indexer.keys(latents.values, latents.start, table, taps.within("indexer."))
        entries = self.numerics.entry(rotate(latents.values, latents.start, table), 2 * len(table))
        entries = taps("compressor.entries", entries)
        if at is None or pending is None:
            return Shared(entries, keys), None
        entries = written(at.cache.entries, entries, latents.block, latents.complete)
        keys = written(at.cache.keys, keys, latents.block, latents.complete)
        return Shared(entries, keys), SourceCache(pending.values, pending.gates, entries, keys)
