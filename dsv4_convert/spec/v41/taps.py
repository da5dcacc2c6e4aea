"""The taps of DeepSeek-V4.1, one row each, in the order of execution (:mod:`dsv4_convert.spec.tap`).

Rows that V4 has too are V4's. Two shape letters are V4.1's own: ``J`` table rows that a token looks up, and ``c``
candidate blocks. A layer that reads values of an earlier one has them as an input tap, too.
"""

from __future__ import annotations

from dsv4_convert.spec.tap import AFTER, Tap, TapOrigin, Values, Where
from dsv4_convert.spec.v4 import taps as v4
from dsv4_convert.spec.v41.kinds import Candidates

KV_SOURCE = Where("KV sources", lambda config, layer: config.compresses(layer))
ENGRAM = Where("layers with an engram", lambda config, layer: config.has_engram(layer))
READS_ENTRIES = Where(
    "layers that read another layer's entries",
    lambda config, layer: config.ratio_of(layer) > 0 and not config.compresses(layer),
)
READS_KEYS = Where(
    "index sources that are no KV sources", lambda config, layer: config.indexes(layer) and not config.compresses(layer)
)
READS_CHOICE = Where(
    "layers that read another layer's choice",
    lambda config, layer: config.ratio_of(layer) > 0 and not config.indexes(layer),
)
NOMINATES = Where("candidate source", lambda config, layer: config.layer_kind(layer).candidates is Candidates.SOURCE)
READS_CANDIDATES = Where(
    "index sources after the candidate source",
    lambda config, layer: config.layer_kind(layer).candidates is Candidates.USER,
)

_V4 = {tap.name: tap for tap in v4.TAPS}


def _as_v4(*names: str) -> tuple[Tap, ...]:
    return tuple(_V4[name] for name in names)


def _hyper_connection(path: str) -> tuple[Tap, ...]:
    return _as_v4(*(f"{path}.{part}" for part in ("pre", "post", "comb", "collapsed")))


TAPS: tuple[Tap, ...] = (
    *_as_v4("streams"),
    Tap("pre", "B S N", "weights of the stage before, which collapse the streams that leave it", v4.DSPARK_LATER,
        origin=TapOrigin("hc_ffn.pre", lambda config, layer: layer - 1)),
    *_as_v4("context", "targets", "main", "main_proj", "main_norm", "attn.main.wkv", "attn.main.kv_norm",
            "attn.main.kv_rope", "embed", "input"),
    Tap("input.pre", "B S N", "weights of the half before, which collapse the streams that enter the layer",
        origin=TapOrigin("hc_ffn.pre", lambda config, layer: layer - 1)),
    Tap("input.entries", "B T C", "compressed entries of an earlier layer", READS_ENTRIES,
        origin=TapOrigin("attn.compressor.entries", lambda config, layer: config.kv_source(layer))),
    Tap("input.keys", "B T Ci", "index keys of an earlier layer", READS_KEYS,
        origin=TapOrigin("attn.indexer.keys", lambda config, layer: config.kv_source(layer))),
    Tap("input.chosen", "B S k", "an earlier layer's choice of entries", READS_CHOICE, Values.CHOICE,
        origin=TapOrigin("attn.indexer.chosen", lambda config, layer: config.index_source(layer))),
    Tap("input.candidates", "B S c", "an earlier layer's candidate blocks", READS_CANDIDATES, Values.CHOICE,
        origin=TapOrigin("attn.indexer.candidates", lambda config, layer: config.candidate_source_layer_id)),
    Tap("engram.ids", "B S J", "rows of the table that n-grams are hashed to", ENGRAM, Values.CHOICE),
    Tap("engram.key", "B S N D", "keys of the streams", ENGRAM, weights=("engram.embed", "engram.wkv")),
    Tap("engram.value", "B S D", "what the table has for the token", ENGRAM, weights=("engram.embed", "engram.wkv")),
    Tap("engram.gate", "B S N", "share of the value that each stream gets", ENGRAM,
        weights=("engram.q_weight", "engram.k_weight")),
    Tap("engram.streams", "B S N D", "streams after the engram", ENGRAM),
    *_hyper_connection("hc_attn"),
    *_as_v4("attn_norm", "attn.wq_a", "attn.q_norm", "attn.wq_b", "attn.q_rope", "attn.wkv", "attn.kv_norm",
            "attn.kv_rope", "attn.compressor.wkv", "attn.compressor.wgate", "attn.compressor.pooled",
            "attn.compressor.norm"),
    Tap("attn.indexer.wk", "B T Ci", "index keys before their norm, from the unrotated latent", KV_SOURCE,
        weights=("attn.indexer.wk",)),
    Tap("attn.indexer.k_norm", "B T Ci", "index keys after their norm", KV_SOURCE, weights=("attn.indexer.k_norm",)),
    Tap("attn.indexer.keys", "B T Ci", "rotated index keys", KV_SOURCE),
    *_as_v4("attn.compressor.entries", "attn.indexer.q_rope", "attn.indexer.weights_proj", "attn.indexer.scores"),
    Tap("attn.indexer.candidates", "B S c", "blocks of entries that later indexers choose from", NOMINATES,
        Values.CHOICE, scores="attn.indexer.scores", of_blocks=True),
    *_as_v4("attn.indexer.chosen", "attn.context", "attn.context_unrotated", "attn.wo_a", "attn.wo_b",
            "hc_attn.streams"),
    *_hyper_connection("hc_ffn"),
    *_as_v4("ffn_norm", "ffn.gate.logits", "ffn.gate.scores", "ffn.gate.experts", "ffn.gate.weights", "ffn.experts",
            "ffn.shared_experts", "ffn", "hc_ffn.streams"),
    Tap("hc_head.collapsed", "B S D", "streams collapsed with the weights of the last half", AFTER),
    *_as_v4("norm", "logits", "markov_head.embed", "markov_head", "draft_logits", "tokens", "confidence"),
)  # fmt: skip

#: The cache that a layer keeps for decoding. Entries and index keys, part of it too, are taps already.
STATE: tuple[Tap, ...] = tuple(
    tap for tap in v4.STATE if tap.name in ("cache.window", "cache.compressor.values", "cache.compressor.gates")
)
