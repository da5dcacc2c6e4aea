"""THE table of DeepSeek-V4.1: which checkpoint tensor becomes which model parameter, how, and in which dtype.

transformers has no model of this architecture, so the published names serve every dialect. The draft stages (``mtp.N``)
have the rows of a window-only layer and what leads into the first and out of the last of them. The vision encoder is
carried along: dsv4 converts its tensors and computes nothing with them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dsv4_convert.spec.names import ALWAYS, Kind, NameTable, Rule, Section, Transform, When, common_sizes
from dsv4_convert.spec.vision import WITH_VISION, vision_rules

#: ``[out, in]`` elements of an FP8 weight, and of a row of an n-gram table, that share one scale.
FP8_TILE, ENGRAM_TILE = (32, 32), (1, 32)

KV_SOURCE = When("KV source", lambda config, layer: config.compresses(layer))
POOLED = When("KV source of ratio 2", lambda config, layer: config.compresses(layer) and config.ratio_of(layer) > 1)
INDEX_SOURCE = When("index source", lambda config, layer: config.indexes(layer))
ENGRAM = When("engram", lambda config, layer: config.has_engram(layer))
FIRST_STAGE = When("first", lambda config, layer: layer == config.stage_layers[0])
LAST_STAGE = When("last", lambda config, layer: layer == config.stage_layers[-1])


def sizes(config: Any, layer: int | None = None) -> dict[str, int]:
    """The symbols of the ``shape`` column; the rows of an n-gram table, and the experts, depend on the layer."""
    known = common_sizes(config, layer)
    engram, vision = config.engram, config.vision
    if engram is not None and layer in engram.layer_ids:
        known |= {
            "Re": engram.num_embeddings[engram.layer_ids.index(layer)],
            "Ce": engram.head_dim,
            "KeCe": engram.columns * engram.head_dim,
            "(N+1)D": (config.hc_mult + 1) * config.hidden_size,
        }
    if vision is not None:
        known |= vision.sizes
    return known


_T = Transform.TRANSPOSE


def _row(
    path: str, shape: str, kind: Kind, transform: Transform = Transform.NONE, when: When = ALWAYS,
    *, weight: bool = True, section: Section = Section.LAYERS, tile: tuple[int, int] = FP8_TILE,
) -> Rule:  # fmt: skip
    """One row, of a layer by default; ``weight`` says whether the checkpoint's name ends in ``.weight``."""
    prefix = {Section.LAYERS: "layers.{}.", Section.STAGES: "mtp.{}."}.get(section, "")
    stack = path.replace("experts.w", "experts.{}.w") if kind is Kind.EXPERT else path
    return Rule(
        path=prefix + path,
        published=prefix + stack + (".weight" if weight else ""),
        shape=shape,
        kind=kind,
        transform=transform,
        section=section,
        when=when,
        tile=tile,
    )


def _hyper_connection(path: str) -> tuple[Rule, ...]:
    return tuple(
        _row(f"{path}_{part}", shape, Kind.FLOAT32, weight=False)
        for part, shape in (("fn", "M ND"), ("base", "M"), ("scale", "3"))
    )


def _model(path: str, shape: str, kind: Kind, transform: Transform = Transform.NONE) -> Rule:
    return _row(path, shape, kind, transform, section=Section.MODEL)


#: The rows of a layer that draft stages have too, up to the attention's inputs and from there on.
_SHARED: tuple[Rule, ...] = (
    *_hyper_connection("hc_attn"),
    _row("attn_norm", "D", Kind.NORM),
    _row("attn.wq_a", "R D", Kind.LINEAR, _T),
    _row("attn.q_norm", "R", Kind.NORM),
    _row("attn.wq_b", "HC R", Kind.LINEAR, _T),
    _row("attn.wkv", "C D", Kind.LINEAR, _T),
    _row("attn.kv_norm", "C", Kind.NORM),
    _row("attn.attn_sink", "H", Kind.FLOAT32, weight=False),
    _row("attn.wo_a", "GO HC/G", Kind.LINEAR, Transform.GROUPED),
    _row("attn.wo_b", "D GO", Kind.LINEAR, _T),
    *_hyper_connection("hc_ffn"),
    _row("ffn_norm", "D", Kind.NORM),
    _row("ffn.gate.weight", "E D", Kind.PLAIN, _T, weight=False),
    _row("ffn.gate.bias", "E", Kind.FLOAT32, weight=False),
    _row("ffn.gate.bias_vl", "E", Kind.FLOAT32, when=WITH_VISION, weight=False),
    _row("ffn.experts.w1", "I D", Kind.EXPERT, _T),
    _row("ffn.experts.w2", "D I", Kind.EXPERT, _T),
    _row("ffn.experts.w3", "I D", Kind.EXPERT, _T),
    _row("ffn.shared_experts.w1", "I D", Kind.LINEAR, _T),
    _row("ffn.shared_experts.w2", "D I", Kind.LINEAR, _T),
    _row("ffn.shared_experts.w3", "I D", Kind.LINEAR, _T),
)  # fmt: skip

RULES: tuple[Rule, ...] = (
    _model("embed", "V D", Kind.PLAIN),
    _model("norm", "D", Kind.NORM),
    _model("head", "V D", Kind.PLAIN, _T),
    _row("engram.embed", "Re Ce", Kind.LINEAR, when=ENGRAM, tile=ENGRAM_TILE),
    _row("engram.wkv", "(N+1)D KeCe", Kind.LINEAR, _T, ENGRAM),
    _row("engram.q_weight", "N D", Kind.NORM, when=ENGRAM, weight=False),
    _row("engram.k_weight", "N D", Kind.NORM, when=ENGRAM, weight=False),
    _row("attn.compressor.wkv", "C D", Kind.PLAIN, _T, KV_SOURCE),
    _row("attn.compressor.wgate", "C D", Kind.PLAIN, _T, POOLED),
    _row("attn.compressor.norm", "C", Kind.NORM, when=KV_SOURCE),
    _row("attn.indexer.wq_b", "HiCi R", Kind.LINEAR, _T, INDEX_SOURCE),
    _row("attn.indexer.weights_proj", "Hi D", Kind.PLAIN, _T, INDEX_SOURCE),
    _row("attn.indexer.wk", "Ci C", Kind.PLAIN, _T, KV_SOURCE),
    _row("attn.indexer.k_norm", "Ci", Kind.NORM, when=KV_SOURCE),
    *_SHARED,
)


def _stage(path: str, shape: str, kind: Kind, transform: Transform = Transform.NONE, when: When = LAST_STAGE) -> Rule:
    """A row of a draft stage that layers have not."""
    return _row(path, shape, kind, transform, when, section=Section.STAGES)


def _markov(part: str, published: str, transform: Transform = Transform.NONE) -> Rule:
    """A table of the Markov head, which the parameter tree calls as V4's."""
    row = _stage(f"markov_head.{published}", "V Rm", Kind.PLAIN, transform)
    return dataclasses.replace(row, path=f"mtp.{{}}.markov_head.markov_{part}")


def _of_stage(rule: Rule) -> Rule:
    """The same row of a draft stage's own layer."""
    path, published = (text.replace("layers.", "mtp.", 1) for text in (rule.path, rule.published))
    return dataclasses.replace(rule, path=path, published=published, section=Section.STAGES)


STAGE_RULES: tuple[Rule, ...] = (
    *map(_of_stage, _SHARED),
    _stage("main_proj", "D TD", Kind.LINEAR, _T, FIRST_STAGE),
    _stage("main_norm", "D", Kind.NORM, when=FIRST_STAGE),
    _stage("norm", "D", Kind.NORM),
    _markov("w1", "embed"),
    _markov("w2", "head", _T),
    _stage("confidence_head.proj", "1 D+Rm", Kind.PLAIN, _T),
)


VISION_RULES = vision_rules("start", "end", "newline")

NAMES = NameTable("DeepSeek-V4.1", (*RULES, *STAGE_RULES, *VISION_RULES), sizes)
