"""THE table: which checkpoint tensor becomes which model parameter, how, and in which dtype.

One :class:`Rule` per parameter. A name is looked up by its *template*: the name with every purely numeric component
replaced by ``{}``, so ``layers.12.ffn.experts.7.w1.weight`` is found under ``layers.{}.ffn.experts.{}.w1.weight`` with
the numbers (12, 7). A lookup is exact, never a prefix match, so no rule can swallow a neighbour. The same rows are read
in both directions; :mod:`dsv4_convert.spec.coverage` proves with them that a checkpoint and the model cover each other.

Dialects (``Dialect``):

* ``published``: DeepSeek's repositories, ``layers.N.attn.wq_a.weight`` beside ``layers.N.attn.wq_a.scale``.
* ``transformers``: what ``save_pretrained`` of transformers 5.23.0 writes, ``model.layers.N.attn.wq_a.weight``.
* ``module``: attribute names of transformers' modules, ``model.layers.N.self_attn.q_a_proj.weight``, which other tools
  write; routed experts either one by one or fused as ``experts.gate_up_proj`` (gate rows first).

Parameter paths follow the published names, because that is what people search for.

The stages of multi-token prediction (``mtp.N``) have rows of their own, :data:`STAGE_RULES`, made from those of the
layers. transformers drops these tensors, so there is no other spelling than the published one: it serves every dialect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.show.units import ranges
from dsv4_convert.spec.config import AttentionKind, Config

#: Written into every conversion; raise it when a row changes the meaning or the layout of a stored parameter.
TABLE_VERSION = 1


class Dialect(StrEnum):
    """A spelling of tensor names."""

    PUBLISHED = "published"
    TRANSFORMERS = "transformers"
    MODULE = "module"


class Transform(StrEnum):
    """How the stored matrix becomes the parameter."""

    NONE = "none"
    #: ``[out, in] -> [in, out]``, so that the model computes ``x @ w``.
    TRANSPOSE = "transpose"
    #: ``[groups * out, in] -> [groups, in, out]``: the block-diagonal first half of the output projection.
    GROUPED = "grouped"


class Kind(StrEnum):
    """The dtype contract of a tensor: what a checkpoint may hold, and what the conversion makes of it."""

    #: FP8 with 128x128 scales in a release; BF16 or F32 in a full-precision copy. Follows ``--dtype``.
    LINEAR = "linear"
    #: A routed expert: packed FP4 with 32-wide scales, or like LINEAR. Follows ``--dtype``.
    EXPERT = "expert"
    #: BF16 in a release and never quantised. Follows ``--dtype``.
    PLAIN = "plain"
    #: A norm weight: BF16 in a release, F32 where transformers saved it; keeps the dtype that it has.
    NORM = "norm"
    #: F32 everywhere, never narrowed.
    FLOAT32 = "float32"
    #: An index table, I64 on disk, never through a float.
    INTEGER = "integer"

    @property
    def follows_dtype(self) -> bool:
        """Whether ``--dtype`` converts tensors of this kind; the others keep the dtype that they have."""
        return self in (Kind.LINEAR, Kind.EXPERT, Kind.PLAIN)


#: ``[out, in]`` elements that share one scale.
FP8_TILE = (128, 128)
FP4_GROUP = (1, 32)


class When(StrEnum):
    """The layers in which a per-layer parameter exists."""

    ALWAYS = "all"
    COMPRESSED = "CSA and HCA"
    CSA = "CSA"
    HASH = "hash-routed"
    LEARNED = "score-routed"

    def holds(self, config: Config, layer: int) -> bool:
        """Whether the parameter exists in ``layer``."""
        match self:
            case When.ALWAYS:
                return True
            case When.COMPRESSED:
                return config.kind(layer) is not AttentionKind.SLIDING
            case When.CSA:
                return config.kind(layer) is AttentionKind.CSA
            case When.HASH:
                return config.hashed(layer)
            case When.LEARNED:
                return not config.hashed(layer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One row: one parameter, or one per layer or stage, or one stack of experts per layer or stage."""

    path: str
    published: str
    module: str
    #: Symbolic published shape, e.g. ``"HC R"``; the symbols are explained by :func:`sizes`.
    shape: str
    kind: Kind
    transform: Transform = Transform.NONE
    when: When = When.ALWAYS
    #: Name under ``save_pretrained`` where it is not simply ``model.`` + published.
    saved: str | None = None
    #: Fused module tensor that holds the whole stack, and which half of its rows (None: all of them).
    fused: str | None = None
    half: int | None = None

    @property
    def per_layer(self) -> bool:
        """Whether the parameter exists once per layer."""
        return self.path.startswith("layers.{}.")

    @property
    def per_stage(self) -> bool:
        """Whether the parameter exists once per stage after the backbone."""
        return self.path.startswith("mtp.{}.")

    def numbers(self, config: Config, layer: int | None, expert: int | None = None) -> tuple[int, ...]:
        """Values for the ``{}`` placeholders of its names: layer or stage, and expert, if it has them."""
        first = layer - config.num_hidden_layers if self.per_stage and layer is not None else layer
        return tuple(number for number in (first, expert) if number is not None)

    @property
    def per_expert(self) -> bool:
        """Whether the checkpoint holds one tensor per expert, stacked to ``[E, ...]`` in the model."""
        return self.kind is Kind.EXPERT

    def template(self, dialect: Dialect) -> str:
        """The name of the tensor in ``dialect``, numbers as ``{}``."""
        match dialect:
            case Dialect.PUBLISHED:
                return self.published
            case _ if self.per_stage:
                return self.published
            case Dialect.TRANSFORMERS:
                return self.saved or "model." + self.published
            case Dialect.MODULE:
                return self.module

    def scale_template(self, dialect: Dialect) -> str | None:
        """The name of the scale tensor beside a quantised weight; None where the rule or the dialect has none."""
        if self.per_stage:
            dialect = Dialect.PUBLISHED
        if self.kind not in (Kind.LINEAR, Kind.EXPERT) or dialect is Dialect.TRANSFORMERS:
            return None
        stem = self.template(dialect).removesuffix(".weight")
        return stem + (".scale" if dialect is Dialect.PUBLISHED else ".weight_scale_inv")

    def source_shape(self, config: Config, layer: int | None) -> tuple[int, ...]:
        """Shape of the unpacked source tensor (of one expert, for a stack), as published: ``[out, in]``."""
        known = sizes(config, layer)
        return tuple(known[symbol] for symbol in self.shape.split())

    def target_shape(self, config: Config, layer: int | None) -> tuple[int, ...]:
        """Shape of the model's parameter."""
        shape = self.source_shape(config, layer)
        match self.transform:
            case Transform.TRANSPOSE:
                shape = shape[::-1]
            case Transform.GROUPED:
                shape = (config.o_groups, shape[1], shape[0] // config.o_groups)
            case Transform.NONE:
                pass
        return (config.n_routed_experts, *shape) if self.per_expert else shape


def sizes(config: Config, layer: int | None = None) -> dict[str, int]:
    """The symbols of the ``shape`` column; those of the compressor depend on the layer."""
    kind = config.kind(layer) if layer is not None else AttentionKind.SLIDING
    overlap = 2 if kind is AttentionKind.CSA else 1
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "N": config.hc_mult,
        "M": config.hc_mixes,
        "ND": config.hc_mult * config.hidden_size,
        "H": config.num_attention_heads,
        "C": config.head_dim,
        "HC": config.num_attention_heads * config.head_dim,
        "R": config.q_lora_rank,
        "GO": config.o_groups * config.o_lora_rank,
        "HC/G": config.num_attention_heads * config.head_dim // config.o_groups,
        "r": config.ratio(kind),
        "oC": overlap * config.head_dim,
        "Hi": config.index_n_heads,
        "Ci": config.index_head_dim,
        "2Ci": 2 * config.index_head_dim,
        "HiCi": config.index_n_heads * config.index_head_dim,
        "E": config.n_routed_experts,
        "K": config.num_experts_per_tok,
        "I": config.moe_intermediate_size,
        "1": 1,
        "3": 3,
    }


def _layer(
    path: str, module: str, shape: str, kind: Kind, transform: Transform = Transform.NONE, when: When = When.ALWAYS,
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
        when=when,
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
    *_compressor("attn.compressor", "self_attn.compressor", "oC", "C", When.COMPRESSED),
    _layer("attn.indexer.wq_b", "self_attn.compressor.indexer.q_b_proj.weight", "HiCi R", Kind.LINEAR, _T, When.CSA),
    _layer("attn.indexer.weights_proj", "self_attn.compressor.indexer.scorer.weights_proj.weight", "Hi D",
           Kind.PLAIN, _T, When.CSA),
    *_compressor("attn.indexer.compressor", "self_attn.compressor.indexer", "2Ci", "Ci", When.CSA),
    _layer("attn.wo_a", "self_attn.o_a_proj.weight", "GO HC/G", Kind.LINEAR, Transform.GROUPED),
    _layer("attn.wo_b", "self_attn.o_b_proj.weight", "D GO", Kind.LINEAR, _T),
    *_hyper_connection("hc_ffn", "ffn_hc"),
    _layer("ffn_norm", "post_attention_layernorm.weight", "D", Kind.NORM),
    _layer("ffn.gate.weight", "mlp.gate.weight", "E D", Kind.PLAIN, _T, weight=False),
    _layer("ffn.gate.bias", "mlp.gate.e_score_correction_bias", "E", Kind.FLOAT32, when=When.LEARNED, weight=False),
    _layer("ffn.gate.tid2eid", "mlp.gate.tid2eid", "V K", Kind.INTEGER, when=When.HASH, weight=False),
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


def _stage(path: str, shape: str, kind: Kind, transform: Transform = Transform.NONE, *, weight: bool = True) -> Rule:
    """A row of a stage that layers have not."""
    published = f"mtp.{{}}.{path}" + (".weight" if weight else "")
    return Rule(
        path=f"mtp.{{}}.{path}", published=published, module=published, shape=shape, kind=kind, transform=transform
    )


def _of_stage(rule: Rule) -> Rule:
    """The same row of a stage's own layer."""
    path, published = (text.replace("layers.", "mtp.", 1) for text in (rule.path, rule.published))
    return dataclasses.replace(
        rule, path=path, published=published, module=published, saved=None, fused=None, half=None
    )


#: The rows of every stage after the backbone: a window-only, score-routed layer, what leads into it, and a head.
STAGE_RULES: tuple[Rule, ...] = (
    *(_of_stage(rule) for rule in RULES if rule.per_layer and rule.when in (When.ALWAYS, When.LEARNED)),
    _stage("e_proj", "D D", Kind.LINEAR, _T),
    _stage("h_proj", "D D", Kind.LINEAR, _T),
    _stage("enorm", "D", Kind.NORM),
    _stage("hnorm", "D", Kind.NORM),
    _stage("norm", "D", Kind.NORM),
    _stage("hc_head_fn", "N ND", Kind.FLOAT32, weight=False),
    _stage("hc_head_base", "N", Kind.FLOAT32, weight=False),
    _stage("hc_head_scale", "1", Kind.FLOAT32, weight=False),
)

#: Why DSpark's draft stages, which the dated releases have below ``mtp.``, are left out.
DSPARK = "draft stage of DSpark, another architecture than mtp, which dsv4 does not convert"

#: Templates below which names are left out on purpose, and why. These only DSpark has; where one of them is there, all
#: of ``mtp.`` belongs to it.
DROPS: dict[str, str] = {
    f"mtp.{{}}.{part}": DSPARK for part in ("main_proj", "main_norm", "markov_head", "confidence_head")
}


def template(name: str) -> tuple[str, tuple[int, ...]]:
    """Split a name into its template and its numbers: ``("layers.{}.attn_norm.weight", (12,))``.

    Only canonical decimals count as numbers, so ``layers.01.…`` and ``layers.１.…`` stay unknown names.
    """
    parts = name.split(".")
    numbers = []
    for i, part in enumerate(parts):
        if part.isascii() and part.isdecimal() and (part == "0" or part[0] != "0") and len(part) < 10:
            numbers.append(int(part))
            parts[i] = "{}"
    return ".".join(parts), tuple(numbers)


class Use(NamedTuple):
    """The use of one tensor name. A tuple, because a release has a hundred thousand of them."""

    rule: Rule
    layer: int | None
    expert: int | None
    is_scale: bool = False
    #: The tensor holds the whole stack of experts.
    fused: bool = False
    #: The stage after the backbone, for a tensor of one; ``layer`` is then None.
    stage: int | None = None


#: Template of a tensor -> (rule, is a scale, is fused); a fused tensor may serve two rules.
_Entry = tuple[Rule, bool, bool]


def _index(dialect: Dialect) -> dict[str, list[_Entry]]:
    table: dict[str, list[_Entry]] = {}
    for rule in (*RULES, *STAGE_RULES):
        table.setdefault(rule.template(dialect), []).append((rule, False, False))
        scale = rule.scale_template(dialect)
        if scale is not None:
            table.setdefault(scale, []).append((rule, True, False))
        if dialect is Dialect.MODULE and rule.fused is not None:
            table.setdefault(rule.fused, []).append((rule, False, True))
    return table


_INDEX = {dialect: _index(dialect) for dialect in Dialect}


def lookup(name: str, dialect: Dialect) -> tuple[Use, ...]:
    """Every use of ``name`` under ``dialect``: one, two for a fused gate/up tensor, none if the name is unknown."""
    key, numbers = template(name)
    uses = []
    for rule, is_scale, fused in _INDEX[dialect].get(key, ()):
        layer = numbers[0] if rule.per_layer else None
        expert = numbers[1] if rule.per_expert and not fused else None
        uses.append(Use(rule, layer, expert, is_scale, fused, numbers[0] if rule.per_stage else None))
    return tuple(uses)


def drop_reason(name: str) -> str | None:
    """Why a tensor is left out on purpose, as far as its name alone says so; None for every other name."""
    key, _ = template(name)
    return next((reason for prefix, reason in DROPS.items() if key.startswith(f"{prefix}.")), None)


def layer_of(name: str) -> int | None:
    """The backbone layer that a tensor of any dialect belongs to; None for those of the model level and of stages."""
    key, numbers = template(name)
    return numbers[0] if key.startswith(("layers.{}.", "model.layers.{}.")) else None


def stage_of(name: str) -> int | None:
    """The stage after the backbone (``mtp.N``, also one of DSpark) that a tensor belongs to; None for every other."""
    if not name.startswith("mtp."):
        return None
    key, numbers = template(name)
    return numbers[0] if key.startswith("mtp.{}.") else None


def detect_dialect(names: Iterable[str]) -> Dialect:
    """The dialect that knows most of the names. Raises :class:`BadInput` if no name is known to any."""
    names = list(names)
    keys = [template(name)[0] for name in names]
    known = {dialect: sum(1 for key in keys if key in _INDEX[dialect]) for dialect in Dialect}
    best = max(Dialect, key=lambda dialect: known[dialect])
    if not known[best]:
        raise BadInput(
            f"none of the {len(names)} tensor names is one of a DeepSeek-V4 checkpoint "
            f"(first: {', '.join(sorted(names)[:3]) or 'none'}); `dsv4 names` lists the names that are known"
        )
    return best


def parameters(config: Config, layers: Iterable[int] | None = None) -> Iterator[tuple[str, Rule, int | None]]:
    """Every parameter of the model, or of the chosen layers and stages and the model level: path, rule, layer."""
    chosen = range(config.num_hidden_layers + config.num_mtp_stages) if layers is None else layers
    for rule in RULES:
        if not rule.per_layer:
            yield rule.path, rule, None
    for layer in chosen:
        for rule in STAGE_RULES if layer in config.stage_layers else RULES:
            if (rule.per_layer or rule.per_stage) and rule.when.holds(config, layer):
                yield rule.path.format(*rule.numbers(config, layer)), rule, layer


def check_layers(config: Config, layers: Iterable[int] | None, *, stages: bool = False) -> tuple[int, ...]:
    """The chosen layers, sorted; all of them for None, without stages. With ``stages`` these may be chosen too.

    Raises:
        UsageError: a layer that does not exist.
    """
    if layers is None:
        return tuple(range(config.num_hidden_layers))
    chosen = tuple(sorted(set(layers)))
    there = range(config.num_hidden_layers + (config.num_mtp_stages if stages else 0))
    wrong = [layer for layer in chosen if layer not in there]
    if wrong or not chosen:
        of_stages = f", and its mtp stages are {ranges(config.stage_layers)}" if stages and config.stage_layers else ""
        raise UsageError(
            f"layer{'' if len(wrong) == 1 else 's'} {ranges(wrong)}: this model has the layers 0 to "
            f"{config.num_hidden_layers - 1}{of_stages or ' (mtp stages are not layers)'}"
        )
    return chosen


@dataclasses.dataclass(frozen=True)
class Explanation:
    """One name, in every spelling."""

    path: str
    rule: Rule
    spellings: Mapping[Dialect, tuple[str, ...]]


def explain(name: str) -> tuple[Explanation, ...]:
    """The meaning of a tensor name of any dialect, or of a parameter path, and its spellings in the other dialects.

    Raises:
        UsageError: nothing in the table has that name; names that come close are listed.
    """
    key, numbers = _open_template(name)
    for prefix in ("", *_PREFIXES):
        if found := _explanations(prefix + key, (None, *numbers) if prefix else numbers):
            return found
    raise UsageError(f"{name}: not a tensor or parameter of DeepSeek-V4. Close names: {', '.join(_close(key))}")


def _open_template(name: str) -> tuple[str, tuple[int | None, ...]]:
    """As :func:`template`, with ``N`` and ``E``, as tables print them, for numbers that are left open: None."""
    key, numbers = template(name)
    parts, given = key.split("."), iter(numbers)
    filled = tuple(next(given) if part == "{}" else None for part in parts if part in ("{}", "N", "E"))
    return ".".join("{}" if part in ("N", "E") else part for part in parts), filled


def _explanations(key: str, numbers: Sequence[int | None]) -> tuple[Explanation, ...]:
    """Every rule that has this template in some dialect, or as the path of its parameter."""
    found: dict[str, Explanation] = {}
    by_tensor = [(rule, fused) for dialect in Dialect for rule, _, fused in _INDEX[dialect].get(key, ())]
    by_path = [(rule, True) for rule in (*RULES, *STAGE_RULES) if key == rule.path]
    for rule, stacked in (*by_tensor, *by_path):
        expert = None if stacked or not rule.per_expert else numbers[1]
        found.setdefault(rule.path, _explanation(rule, numbers[0] if numbers else None, expert))
    return tuple(found.values())


def rule_of(path: str) -> Rule:
    """The row of a parameter path such as ``layers.3.ffn.experts.w1``. Raises :class:`UsageError` for another name."""
    key, _ = template(path)
    for rule in (*RULES, *STAGE_RULES):
        if key == rule.path:
            return rule
    raise UsageError(f"{path}: not a parameter of DeepSeek-V4. Close names: {', '.join(_close(key))}")


def _explanation(rule: Rule, number: int | None, expert: int | None) -> Explanation:
    """``number`` is that of the layer or stage."""

    def spell(text: str) -> str:
        numbers = [f"{number}" if number is not None else "N", f"{expert}" if expert is not None else "E"]
        return text.format(*numbers[: text.count("{}")])

    spellings = {}
    for dialect in Dialect:
        names = [rule.template(dialect), rule.scale_template(dialect)]
        if dialect is Dialect.MODULE:
            names.append(rule.fused)
        spellings[dialect] = tuple(spell(text) for text in names if text is not None)
    return Explanation(spell(rule.path), rule, spellings)


#: Prefixes of a parameter's name within its layer.
_PREFIXES = ("layers.{}.", "mtp.{}.", "model.layers.{}.")


def _close(key: str) -> list[str]:
    """Names that come close within their layer; of equal ones that with the prefix of ``key``, else of a layer."""
    import difflib

    def split(text: str) -> tuple[str, str]:
        prefix = next((prefix for prefix in _PREFIXES if text.startswith(prefix)), "")
        return prefix, text.removeprefix(prefix)

    mine, rest = split(key)
    every = {text for table in _INDEX.values() for text in table} | {rule.path for rule in (*RULES, *STAGE_RULES)}
    by_rest: dict[str, str] = {}
    for text in sorted(every, key=lambda text: (split(text)[0] != mine, (*_PREFIXES, "").index(split(text)[0]), text)):
        by_rest.setdefault(split(text)[1], text)
    close = difflib.get_close_matches(rest, list(by_rest), n=4, cutoff=0.3)
    return [by_rest[found].replace("{}", "N", 1).replace("{}", "E") for found in close]
