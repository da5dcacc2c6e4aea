"""The taps of DeepSeek-V4, one row each, in the order of execution (:mod:`dsv4_convert.spec.tap`)."""

from __future__ import annotations

from dsv4_convert.spec.tap import AFTER, BEFORE, LAYER, Tap, TapOrigin, Values, Where

#: In the words of V4; the conditions hold in any architecture.
COMPRESSED = Where("CSA and HCA layers", lambda config, layer: config.compresses(layer))
POOLED = Where("CSA and HCA layers", lambda config, layer: config.compresses(layer) and config.ratio_of(layer) > 1)
CSA = Where("CSA layers", lambda config, layer: config.indexes(layer))
LEARNED = Where("layers with learned routing", lambda config, layer: not config.hashed(layer))
STAGE = Where("mtp stages", lambda config, layer: config.dspark is None and layer in config.stage_layers)
DSPARK = Where("DSpark stages", lambda config, layer: config.drafts_blocks(layer))
DSPARK_FIRST = Where("first DSpark stage", lambda config, layer: DSPARK.holds(config, layer) and config.embeds(layer))
DSPARK_LATER = Where(
    "DSpark stages after the first", lambda config, layer: DSPARK.holds(config, layer) and not config.embeds(layer)
)
DSPARK_LAST = Where("last DSpark stage", lambda config, layer: DSPARK.holds(config, layer) and config.has_head(layer))
READS_STREAMS = Where(
    "mtp stages, and DSpark stages after the first",
    lambda config, layer: layer in config.stage_layers and not DSPARK_FIRST.holds(config, layer),
)
#: The streams that leave the layer before.
STREAMS = TapOrigin("hc_ffn.streams", lambda config, layer: layer - 1)


def _compressor(path: str, width: str, entry: str, where: Where, pooled: Where) -> tuple[Tap, ...]:
    entries = "compressed entries, rotated to the first position of their block"
    return (
        Tap(f"{path}.wkv", f"B S {width}", "values to pool", where, weights=(f"{path}.wkv",)),
        Tap(f"{path}.wgate", f"B S {width}", "gate logits, before the position bias (ape)", pooled,
            weights=(f"{path}.wgate",)),
        Tap(f"{path}.pooled", f"B T {entry}", "gated sum of each block", where, weights=(f"{path}.ape",)),
        Tap(f"{path}.norm", f"B T {entry}", "pooled entries after their norm", where, weights=(f"{path}.norm",)),
        Tap(f"{path}.entries", f"B T {entry}", entries, where),
    )  # fmt: skip


def _hyper_connection(path: str) -> tuple[Tap, ...]:
    weights = (f"{path}_fn", f"{path}_base", f"{path}_scale")
    return (
        Tap(f"{path}.pre", "B S N", "weights that collapse the streams, hc_eps included", weights=weights),
        Tap(f"{path}.post", "B S N", "weights that spread the output over the streams", weights=weights),
        Tap(f"{path}.comb", "B S N N", "doubly stochastic mixing of the streams, [from, to]", weights=weights),
        Tap(f"{path}.collapsed", "B S D", "the collapsed stream"),
    )


def _own(name: str, shape: str, meaning: str, where: Where = LAYER) -> Tap:
    """A tap whose operation has one parameter, of the same name."""
    return Tap(name, shape, meaning, where, weights=(name,))


def _expert(path: str) -> tuple[str, ...]:
    return (f"{path}.w1", f"{path}.w2", f"{path}.w3")


TAPS: tuple[Tap, ...] = (
    Tap("streams", "B S N D", "streams that leave the last layer, or the stage before", READS_STREAMS, origin=STREAMS),
    Tap("context", "B M D", "the first stage's main_norm", DSPARK_LATER,
        origin=TapOrigin("main_norm", lambda config, layer: config.stage_layers[0])),
    Tap("targets", "B M L N D", "streams that leave each target layer; in V4.1, that enter its attention", DSPARK_FIRST,
        origin=TapOrigin("hc_ffn.streams", lambda config, layer: config.draft_sources[-1], stacked=True)),
    Tap("main", "B M LD", "means of these streams, layer after layer", DSPARK_FIRST),
    _own("main_proj", "B M D", "projected means", DSPARK_FIRST),
    _own("main_norm", "B M D", "projected means after their norm, of which all stages make keys", DSPARK_FIRST),
    Tap("attn.main.wkv", "B M C", "the shared key = value of the known tokens", DSPARK, weights=("attn.wkv",)),
    Tap("attn.main.kv_norm", "B M C", "their key = value after its norm", DSPARK, weights=("attn.kv_norm",)),
    Tap("attn.main.kv_rope", "B M C", "their rotated key = value", DSPARK),
    _own("embed", "B S D", "token embedding; in an mtp stage, of the token after", BEFORE),
    _own("enorm", "B S D", "embedding after its norm", STAGE),
    _own("hnorm", "B S N D", "streams after their norm", STAGE),
    _own("e_proj", "B S D", "embedding's part of the stage's streams", STAGE),
    _own("h_proj", "B S N D", "streams' part of the stage's streams", STAGE),
    Tap("input", "B S N D", "streams entering the layer", origin=STREAMS),
    *_hyper_connection("hc_attn"),
    _own("attn_norm", "B S D", "input of the attention"),
    _own("attn.wq_a", "B S R", "low-rank query"),
    _own("attn.q_norm", "B S R", "low-rank query after its norm; feeds the indexer too"),
    _own("attn.wq_b", "B S H C", "queries"),
    Tap("attn.q", "B S H C", "queries after the weightless norm per head"),
    Tap("attn.q_rope", "B S H C", "rotated queries"),
    _own("attn.wkv", "B S C", "the shared key = value"),
    _own("attn.kv_norm", "B S C", "key = value after its norm"),
    Tap("attn.kv_rope", "B S C", "rotated key = value"),
    *_compressor("attn.compressor", "W", "C", COMPRESSED, POOLED),
    *_compressor("attn.indexer.compressor", "2Ci", "Ci", CSA, CSA),
    Tap("attn.indexer.q_rope", "B S Hi Ci", "rotated indexer queries", CSA, weights=("attn.indexer.wq_b",)),
    _own("attn.indexer.weights_proj", "B S Hi", "weight of each indexer head, before scaling", CSA),
    Tap("attn.indexer.scores", "B S T", "index scores, before the causal mask", CSA),
    Tap("attn.indexer.chosen", "B S k", "entries that each query attends to", CSA, Values.CHOICE,
        scores="attn.indexer.scores"),
    Tap("attn.context", "B S H C", "attention output per head, still rotated", weights=("attn.attn_sink",)),
    Tap("attn.context_unrotated", "B S H C", "attention output after the inverse rotation"),
    _own("attn.wo_a", "B S G O", "grouped low-rank output"),
    _own("attn.wo_b", "B S D", "output of the attention"),
    Tap("hc_attn.streams", "B S N D", "streams after the attention half"),
    *_hyper_connection("hc_ffn"),
    _own("ffn_norm", "B S D", "input of the experts"),
    Tap("ffn.gate.logits", "B S E", "router logits", weights=("ffn.gate.weight",)),
    Tap("ffn.gate.scores", "B S E", "scores that experts are chosen by, correction bias included", LEARNED,
        weights=("ffn.gate.bias",)),
    Tap("ffn.gate.experts", "B S K", "chosen experts", LAYER, Values.CHOICE, scores="ffn.gate.scores",
        weights=("ffn.gate.tid2eid",)),
    Tap("ffn.gate.weights", "B S K", "routing weights, in the order of ffn.gate.experts"),
    Tap("ffn.experts", "B S D", "weighted sum of the routed experts", weights=_expert("ffn.experts")),
    Tap("ffn.shared_experts", "B S D", "output of the shared expert", weights=_expert("ffn.shared_experts")),
    Tap("ffn", "B S D", "routed plus shared"),
    Tap("hc_ffn.streams", "B S N D", "streams leaving the layer"),
    Tap("hc_head.pre", "B S N", "weights of the head's collapse", AFTER,
        weights=("hc_head_fn", "hc_head_base", "hc_head_scale")),
    Tap("hc_head", "B S D", "collapsed streams", AFTER),
    _own("norm", "B S D", "input of the output head", AFTER),
    Tap("logits", "B S V", "logits", AFTER, weights=("head",)),
    Tap("markov_head.embed", "B S Rm", "row of the token before in the Markov head's table", DSPARK_LAST,
        weights=("markov_head.markov_w1",)),
    Tap("markov_head", "B S V", "logits of the token before alone", DSPARK_LAST, weights=("markov_head.markov_w2",)),
    Tap("draft_logits", "B S V", "logits that the drafted tokens are chosen from", DSPARK_LAST),
    Tap("tokens", "B S 1", "drafted tokens", DSPARK_LAST, Values.CHOICE, scores="draft_logits"),
    Tap("confidence", "B S", "logit of the draft being accepted, if those before it are", DSPARK_LAST,
        weights=("confidence_head.proj",)),
)  # fmt: skip


def _pending(path: str, width: str, where: Where) -> tuple[Tap, ...]:
    return (
        Tap(f"{path}.values", f"B p {width}", "values of the block that is not complete", where),
        Tap(f"{path}.gates", f"B p {width}", "its gate logits, before the position bias (ape)", where),
    )


def _overlap(path: str, entry: str) -> tuple[Tap, ...]:
    return (
        Tap(f"{path}.overlap_values", f"B r {entry}", "what the last complete block has for the next one", CSA),
        Tap(f"{path}.overlap_gates", f"B r {entry}", "its gate logits, position bias included", CSA),
    )


#: The cache that a layer keeps for decoding. The compressed entries, part of it too, are taps already.
STATE: tuple[Tap, ...] = (
    Tap("cache.window", "B w C", "rotated key = value of the last tokens"),
    *_pending("cache.compressor", "W", COMPRESSED),
    *_overlap("cache.compressor", "C"),
    *_pending("cache.indexer", "2Ci", CSA),
    *_overlap("cache.indexer", "Ci"),
)
