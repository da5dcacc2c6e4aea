"""THE table of DeepSeek-V4: which checkpoint tensor becomes which model parameter, how, and in which dtype.

The draft stages (``mtp.N``) have rows of their own, :data:`STAGE_RULES`, made from those of the layers: stages of
multi-token prediction, or of DSpark in the dated releases. transformers drops these tensors, so the published spelling
is the only one: it serves every dialect.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dsv4_convert.spec.names import ALWAYS, Kind, NameTable, Rule, Section, Transform, When, common_sizes
from dsv4_convert.spec.v4.kinds import AttentionKind
from dsv4_convert.spec.vision import WITH_VISION, vision_rules

#: ``[out, in]`` elements of an FP8 weight that share one scale.
FP8_TILE = (128, 128)

COMPRESSED = When("CSA and HCA", lambda config, layer: config.kind(layer) is not AttentionKind.SLIDING)
CSA = When("CSA", lambda config, layer: config.kind(layer) is AttentionKind.CSA)
HASH = When("hash-routed", lambda config, layer: config.hashed(layer))
#: With a vision encoder, hash-routed layers too have what chooses by scores: images have no id in the table.
LEARNED = When("score-routed", lambda config, layer: not config.hashed(layer) or config.vision is not None)
MTP = When("mtp", lambda config, layer: config.dspark is None)
DSPARK_FIRST = When("first DSpark", lambda config, layer: config.dspark and layer == config.stage_layers[0])
DSPARK_LAST = When("last DSpark", lambda config, layer: config.dspark and layer == config.stage_layers[-1])
#: The stages whose streams the output head reads.
DRAFT_HEAD = When("mtp and last DSpark", lambda config, layer: not config.dspark or layer == config.stage_layers[-1])


def sizes(config: Any, layer: int | None = None) -> dict[str, int]:
    """The symbols of the ``shape`` column; those of the compressor depend on the layer, and some need DSpark."""
    kind = config.kind(layer) if layer is not None else AttentionKind.SLIDING
    overlap = 2 if kind is AttentionKind.CSA else 1
    vision = {} if config.vision is None else config.vision.sizes
    return (
        common_sizes(config, layer)
        | vision
        | {
            "K": config.num_experts_per_tok,
            "r": config.ratio(kind),
            "oC": overlap * config.head_dim,
            "2Ci": 2 * config.index_head_dim,
        }
    )


def _layer(
    path: str, module: str, shape: str, kind: Kind, transform: Transform = Transform.NONE, when: When = ALWAYS,
    *, weight: bool = True, saved: str | None = None,
) -> Rule:  # fmt: skip
    """A per-layer row; ``weight`` says whether the checkpoint's name ends in ``.weight``."""
    stack = path.replace("experts.w", "experts.{}.w") if kind is Kind.EXPERT else path
    return Rule(
        path="layers.{}." + path,
        published="layers.{}." + stack + (".weight" if weight else ""),
        module="model.layers.{}." + module,
        shape=shape,
        kind=kind,
        transform=transform,
        section=Section.LAYERS,
        when=when,
        tile=FP8_TILE,
        saved=None if saved is None else "model.layers.{}." + saved,
    )


def _fused(rule: Rule, tensor: str, half: int | None = None) -> Rule:
    """A per-layer row whose experts transformers also stores as one ``tensor``, or as one ``half`` of it."""
    return dataclasses.replace(rule, fused="model.layers.{}." + tensor, half=half)


def _hyper_connection(path: str, module: str) -> tuple[Rule, ...]:
    return tuple(
        _layer(f"{path}_{part}", f"{module}.{part}", shape, Kind.FLOAT32, weight=False)
        for part, shape in (("fn", "M ND"), ("base", "M"), ("scale", "3"))
    )


def _compressor(path: str, module: str, width: str, normed: str, when: When) -> tuple[Rule, ...]:
    return (
        _layer(f"{path}.ape", f"{module}.position_bias", f"r {width}", Kind.FLOAT32, when=when, weight=False),
        _layer(f"{path}.wkv", f"{module}.kv_proj.weight", f"{width} D", Kind.PLAIN, Transform.TRANSPOSE, when),
        _layer(f"{path}.wgate", f"{module}.gate_proj.weight", f"{width} D", Kind.PLAIN, Transform.TRANSPOSE, when),
        _layer(f"{path}.norm", f"{module}.kv_norm.weight", normed, Kind.NORM, when=when),
    )


_T = Transform.TRANSPOSE

RULES: tuple[Rule, ...] = (
    Rule(path="embed", published="embed.weight", module="model.embed_tokens.weight",
         saved="model.embed_tokens.weight", shape="V D", kind=Kind.PLAIN),
    *_hyper_connection("hc_attn", "attn_hc"),
    _layer("attn_norm", "input_layernorm.weight", "D", Kind.NORM),
    _layer("attn.wq_a", "self_attn.q_a_proj.weight", "R D", Kind.LINEAR, _T),
    _layer("attn.q_norm", "self_attn.q_a_norm.weight", "R", Kind.NORM),
    _layer("attn.wq_b", "self_attn.q_b_proj.weight", "HC R", Kind.LINEAR, _T),
    _layer("attn.wkv", "self_attn.kv_proj.weight", "C D", Kind.LINEAR, _T),
    # save_pretrained of 5.23.0 writes this one norm under another name than it was read from.
    _layer("attn.kv_norm", "self_attn.kv_norm.weight", "C", Kind.NORM, saved="attn.norm.weight"),
    _layer("attn.attn_sink", "self_attn.sinks", "H", Kind.FLOAT32, weight=False),
    *_compressor("attn.compressor", "self_attn.compressor", "oC", "C", COMPRESSED),
    _layer("attn.indexer.wq_b", "self_attn.compressor.indexer.q_b_proj.weight", "HiCi R", Kind.LINEAR, _T, CSA),
    _layer("attn.indexer.weights_proj", "self_attn.compressor.indexer.scorer.weights_proj.weight", "Hi D",
           Kind.PLAIN, _T, CSA),
    *_compressor("attn.indexer.compressor", "self_attn.compressor.indexer", "2Ci", "Ci", CSA),
    _layer("attn.wo_a", "self_attn.o_a_proj.weight", "GO HC/G", Kind.LINEAR, Transform.GROUPED),
    _layer("attn.wo_b", "self_attn.o_b_proj.weight", "D GO", Kind.LINEAR, _T),
    *_hyper_connection("hc_ffn", "ffn_hc"),
    _layer("ffn_norm", "post_attention_layernorm.weight", "D", Kind.NORM),
    _layer("ffn.gate.weight", "mlp.gate.weight", "E D", Kind.PLAIN, _T, weight=False),
    _layer("ffn.gate.bias", "mlp.gate.e_score_correction_bias", "E", Kind.FLOAT32, when=LEARNED, weight=False),
    dataclasses.replace(_layer("ffn.gate.bias_vl", "", "E", Kind.FLOAT32, when=WITH_VISION, weight=False), module=None),
    _layer("ffn.gate.tid2eid", "mlp.gate.tid2eid", "V K", Kind.INTEGER, when=HASH, weight=False),
    _fused(_layer("ffn.experts.w1", "mlp.experts.{}.gate_proj.weight", "I D", Kind.EXPERT, _T),
           "mlp.experts.gate_up_proj", half=0),
    _fused(_layer("ffn.experts.w2", "mlp.experts.{}.down_proj.weight", "D I", Kind.EXPERT, _T),
           "mlp.experts.down_proj"),
    _fused(_layer("ffn.experts.w3", "mlp.experts.{}.up_proj.weight", "I D", Kind.EXPERT, _T),
           "mlp.experts.gate_up_proj", half=1),
    _layer("ffn.shared_experts.w1", "mlp.shared_experts.gate_proj.weight", "I D", Kind.LINEAR, _T),
    _layer("ffn.shared_experts.w2", "mlp.shared_experts.down_proj.weight", "D I", Kind.LINEAR, _T),
    _layer("ffn.shared_experts.w3", "mlp.shared_experts.up_proj.weight", "I D", Kind.LINEAR, _T),
    Rule(path="hc_head_fn", published="hc_head_fn", module="model.hc_head.hc_fn",
         saved="model.hc_head.hc_fn", shape="N ND", kind=Kind.FLOAT32),
    Rule(path="hc_head_base", published="hc_head_base", module="model.hc_head.hc_base",
         saved="model.hc_head.hc_base", shape="N", kind=Kind.FLOAT32),
    Rule(path="hc_head_scale", published="hc_head_scale", module="model.hc_head.hc_scale",
         saved="model.hc_head.hc_scale", shape="1", kind=Kind.FLOAT32),
    Rule(path="norm", published="norm.weight", module="model.norm.weight", shape="D", kind=Kind.NORM),
    Rule(path="head", published="head.weight", module="lm_head.weight", saved="head.weight", shape="V D",
         kind=Kind.PLAIN, transform=_T),
)  # fmt: skip


def _stage(
    path: str, shape: str, kind: Kind, when: When, transform: Transform = Transform.NONE, *, weight: bool = True
) -> Rule:
    """A row of a stage that layers have not."""
    return Rule(
        path=f"mtp.{{}}.{path}",
        published=f"mtp.{{}}.{path}" + (".weight" if weight else ""),
        shape=shape,
        kind=kind,
        transform=transform,
        section=Section.STAGES,
        when=when,
        tile=FP8_TILE,
    )


def _of_stage(rule: Rule) -> Rule:
    """The same row of a stage's own layer."""
    path, published = (text.replace("layers.", "mtp.", 1) for text in (rule.path, rule.published))
    return dataclasses.replace(
        rule, path=path, published=published, module=None, section=Section.STAGES, saved=None, fused=None, half=None
    )


#: The rows of the stages after the backbone: a window-only, score-routed layer each, what leads into it, and a head.
STAGE_RULES: tuple[Rule, ...] = (
    *(_of_stage(rule) for rule in RULES if rule.per_layer and rule.when in (ALWAYS, LEARNED, WITH_VISION)),
    _stage("e_proj", "D D", Kind.LINEAR, MTP, _T),
    _stage("h_proj", "D D", Kind.LINEAR, MTP, _T),
    _stage("enorm", "D", Kind.NORM, MTP),
    _stage("hnorm", "D", Kind.NORM, MTP),
    _stage("main_proj", "D TD", Kind.LINEAR, DSPARK_FIRST, _T),
    _stage("main_norm", "D", Kind.NORM, DSPARK_FIRST),
    _stage("norm", "D", Kind.NORM, DRAFT_HEAD),
    _stage("hc_head_fn", "N ND", Kind.FLOAT32, DRAFT_HEAD, weight=False),
    _stage("hc_head_base", "N", Kind.FLOAT32, DRAFT_HEAD, weight=False),
    _stage("hc_head_scale", "1", Kind.FLOAT32, DRAFT_HEAD, weight=False),
    _stage("markov_head.markov_w1", "V Rm", Kind.PLAIN, DSPARK_LAST),
    _stage("markov_head.markov_w2", "V Rm", Kind.PLAIN, DSPARK_LAST, _T),
    _stage("confidence_head.proj", "1 D+Rm", Kind.PLAIN, DSPARK_LAST, _T),
)

VISION_RULES = vision_rules("start", "pad", "newline", "end")

NAMES = NameTable("DeepSeek-V4", (*RULES, *STAGE_RULES, *VISION_RULES), sizes)
