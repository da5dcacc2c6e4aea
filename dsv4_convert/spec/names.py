"""The vocabulary of a table of names: which checkpoint tensor becomes which model parameter, how, in which dtype.

One :class:`Rule` per parameter. A name is looked up by its *template*: the name with every purely numeric component
replaced by ``{}``, so ``layers.12.ffn.experts.7.w1.weight`` is found under ``layers.{}.ffn.experts.{}.w1.weight`` with
the numbers (12, 7). A lookup is exact, never a prefix match, so no rule can swallow a neighbour. The same rows are read
in both directions; :mod:`dsv4_convert.spec.coverage` proves with them that a checkpoint and the model cover each other.

The rows of an architecture stand in its own folder, :mod:`dsv4_convert.spec.v4.names` and
:mod:`dsv4_convert.spec.v41.names`, and its config has them as a :class:`NameTable`, ``config.names``.

Dialects (``Dialect``):

* ``published``: DeepSeek's repositories, ``layers.N.attn.wq_a.weight`` beside ``layers.N.attn.wq_a.scale``.
* ``transformers``: what ``save_pretrained`` of transformers 5.23.0 writes, ``model.layers.N.attn.wq_a.weight``.
* ``module``: attribute names of transformers' modules, ``model.layers.N.self_attn.q_a_proj.weight``, which other tools
  write; routed experts either one by one or fused as ``experts.gate_up_proj`` (gate rows first).

Parameter paths follow the published names, because that is what people search for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple

from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.show.units import ranges
from dsv4_convert.spec.config import Config

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

    #: FP8 with scales in a release; BF16 or F32 in a full-precision copy. Follows ``--dtype``.
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


#: ``[out, in]`` elements of a packed FP4 weight that share one scale.
FP4_GROUP = (1, 32)


@dataclasses.dataclass(frozen=True)
class When:
    """The layers, stages or blocks in which a parameter exists, in words and as a condition on config and layer."""

    label: str
    holds: Callable[[Any, int], bool]


ALWAYS = When("all", lambda config, layer: True)


class Section(StrEnum):
    """The parts of a model that have parameters of their own. All but the first have numbered members."""

    MODEL = "model"
    LAYERS = "layers"
    #: The stages after the backbone, ``mtp.N``.
    STAGES = "draft stages"
    #: The vision encoder: blocks, and what is beside them.
    VISION = "vision encoder"

    def first(self, config: Config) -> int:
        """The number that :func:`parameters` gives the first member: stages follow the layers, blocks the stages."""
        if self is Section.STAGES:
            return config.num_hidden_layers
        return config.stage_layers.stop if self is Section.VISION else 0

    def members(self, config: Config) -> range:
        """The numbers of all members."""
        first = self.first(config)
        sizes = {
            Section.LAYERS: config.num_hidden_layers,
            Section.STAGES: config.num_mtp_stages,
            Section.VISION: config.num_vision_blocks,
        }
        return range(first, first + sizes.get(self, 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One row: one parameter, or one per layer, stage or vision block, or one stack of experts for each."""

    path: str
    published: str
    #: Name in transformers' modules; None where they have none, and the published name serves every dialect.
    module: str | None = None
    #: Symbolic published shape, e.g. ``"HC R"``; the symbols are explained by the table's ``sizes``.
    shape: str
    kind: Kind
    transform: Transform = Transform.NONE
    section: Section = Section.MODEL
    when: When = ALWAYS
    #: Name under ``save_pretrained`` where it is not simply ``model.`` + published.
    saved: str | None = None
    #: Fused module tensor that holds the whole stack, and which half of its rows (None: all of them).
    fused: str | None = None
    half: int | None = None
    #: ``[out, in]`` elements that share a scale where the tensor is FP8; None where it never is.
    tile: tuple[int, int] | None = None

    @property
    def per_layer(self) -> bool:
        """Whether the parameter exists once per layer."""
        return self.section is Section.LAYERS

    @property
    def per_stage(self) -> bool:
        """Whether the parameter exists once per stage after the backbone."""
        return self.section is Section.STAGES

    @property
    def numbered(self) -> bool:
        """Whether the parameter exists once per member of its section."""
        return "{}" in self.path

    def numbers(self, config: Config, layer: int | None, expert: int | None = None) -> tuple[int, ...]:
        """Values for the ``{}`` placeholders of its names: the member of its section, and the expert, if any."""
        member = None if layer is None else layer - self.section.first(config)
        return tuple(number for number in (member, expert) if number is not None)

    @property
    def is_table(self) -> bool:
        """Whether its rows are looked up, so that a prompt needs only a few."""
        return self.path.rpartition(".")[2] == "embed"

    @property
    def per_expert(self) -> bool:
        """Whether the checkpoint holds one tensor per expert, stacked to ``[E, ...]`` in the model."""
        return self.kind is Kind.EXPERT

    def block(self, *, packed: bool) -> tuple[int, int]:
        """``[out, in]`` elements that share a scale, of packed FP4 or of FP8."""
        if packed:
            return FP4_GROUP
        assert self.tile is not None, f"{self.path} is never FP8"
        return self.tile

    def template(self, dialect: Dialect) -> str:
        """The name of the tensor in ``dialect``, numbers as ``{}``."""
        if dialect is Dialect.PUBLISHED or self.module is None:
            return self.published
        if dialect is Dialect.MODULE:
            return self.module
        return self.saved or "model." + self.published

    def scale_template(self, dialect: Dialect) -> str | None:
        """The name of the scale tensor beside a quantised weight; None where the rule or the dialect has none."""
        if self.module is None:
            dialect = Dialect.PUBLISHED
        if self.kind not in (Kind.LINEAR, Kind.EXPERT) or dialect is Dialect.TRANSFORMERS:
            return None
        stem = self.template(dialect).removesuffix(".weight")
        return stem + (".scale" if dialect is Dialect.PUBLISHED else ".weight_scale_inv")

    def source_shape(self, config: Config, layer: int | None) -> tuple[int, ...]:
        """Shape of the unpacked source tensor (of one expert, for a stack), as published: ``[out, in]``."""
        known = config.names.sizes(config, layer)
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
        return (config.experts_of(layer), *shape) if self.per_expert else shape


def common_sizes(config: Config, layer: int | None) -> dict[str, int]:
    """The symbols of the ``shape`` column that mean the same in every architecture."""
    known = {
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
        "Hi": config.index_n_heads,
        "Ci": config.index_head_dim,
        "HiCi": config.index_n_heads * config.index_head_dim,
        "E": config.experts_of(layer),
        "I": config.moe_intermediate_size,
        "1": 1,
        "3": 3,
    }
    if config.dspark is not None:
        rank = config.dspark.markov_rank
        targets = len(config.dspark.target_layer_ids) * config.hidden_size
        known |= {"TD": targets, "Rm": rank, "D+Rm": config.hidden_size + rank}
    return known


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
    #: The member of the rule's section.
    number: int | None
    expert: int | None
    is_scale: bool = False
    #: The tensor holds the whole stack of experts.
    fused: bool = False

    @property
    def layer(self) -> int | None:
        """The layer, for a tensor of one."""
        return self.number if self.rule.section is Section.LAYERS else None


#: Template of a tensor -> (rule, is a scale, is fused); a fused tensor may serve two rules.
_Entry = tuple[Rule, bool, bool]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """One name, in every spelling."""

    path: str
    rule: Rule
    spellings: Mapping[Dialect, tuple[str, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class NameTable:
    """The rows of one architecture, and lookups in them.

    Attributes:
        title: the architecture in prose.
        rules: every row: those of a section stand together, in the order in which they are shown.
        sizes: the symbols of the ``shape`` column for a config and a layer.
    """

    title: str
    rules: tuple[Rule, ...]
    sizes: Callable[[Any, int | None], Mapping[str, int]]

    @cached_property
    def _index(self) -> Mapping[Dialect, Mapping[str, list[_Entry]]]:
        found: dict[Dialect, dict[str, list[_Entry]]] = {dialect: {} for dialect in Dialect}
        for dialect, table in found.items():
            for rule in self.rules:
                table.setdefault(rule.template(dialect), []).append((rule, False, False))
                scale = rule.scale_template(dialect)
                if scale is not None:
                    table.setdefault(scale, []).append((rule, True, False))
                if dialect is Dialect.MODULE and rule.fused is not None:
                    table.setdefault(rule.fused, []).append((rule, False, True))
        return found

    @cached_property
    def _by_path(self) -> Mapping[str, Rule]:
        return {rule.path: rule for rule in self.rules}

    def of(self, section: Section) -> tuple[Rule, ...]:
        """The rows of one section."""
        return tuple(rule for rule in self.rules if rule.section is section)

    def lookup(self, name: str, dialect: Dialect) -> tuple[Use, ...]:
        """Every use of ``name`` under ``dialect``: one, two for a fused gate/up tensor, none if it is unknown."""
        key, numbers = template(name)
        uses = []
        for rule, is_scale, fused in self._index[dialect].get(key, ()):
            expert = numbers[1] if rule.per_expert and not fused else None
            uses.append(Use(rule, numbers[0] if rule.numbered else None, expert, is_scale, fused))
        return tuple(uses)

    def detect_dialect(self, names: Iterable[str]) -> Dialect:
        """The dialect that knows most of the names. Raises :class:`BadInput` if no name is known to any."""
        names = list(names)
        keys = [template(name)[0] for name in names]
        known = {dialect: sum(1 for key in keys if key in self._index[dialect]) for dialect in Dialect}
        best = max(Dialect, key=lambda dialect: known[dialect])
        if not known[best]:
            raise BadInput(
                f"none of the {len(names)} tensor names is one of a {self.title} checkpoint "
                f"(first: {', '.join(sorted(names)[:3]) or 'none'}); `dsv4 names` lists the names that are known"
            )
        return best

    def rule_of(self, path: str) -> Rule:
        """The row of a parameter path such as ``layers.3.ffn.experts.w1``.

        Raises:
            UsageError: no parameter has that path.
        """
        key, _ = template(path)
        rule = self._by_path.get(key)
        if rule is None:
            close = ", ".join(self._close(key))
            raise UsageError(f"{path}: not a parameter of {self.title}. Close names: {close}")
        return rule

    def find(self, name: str) -> tuple[Explanation, ...]:
        """The meaning of a tensor name of any dialect, or of a parameter path, and its spellings in the other dialects.

        Nothing if the table has no such name.
        """
        key, numbers = _open_template(name)
        for prefix in ("", *_PREFIXES):
            if found := self._explanations(prefix + key, (None, *numbers) if prefix else numbers):
                return found
        return ()

    def explain(self, name: str) -> tuple[Explanation, ...]:
        """As :meth:`find`.

        Raises:
            UsageError: nothing in the table has that name; names that come close are listed.
        """
        found = self.find(name)
        if not found:
            close = ", ".join(self._close(_open_template(name)[0]))
            raise UsageError(f"{name}: not a tensor or parameter of {self.title}. Close names: {close}")
        return found

    def _explanations(self, key: str, numbers: Sequence[int | None]) -> tuple[Explanation, ...]:
        """Every rule that has this template in some dialect, or as the path of its parameter."""
        found: dict[str, Explanation] = {}
        by_tensor = [(rule, fused) for dialect in Dialect for rule, _, fused in self._index[dialect].get(key, ())]
        by_path = [(rule, True) for rule in self.rules if key == rule.path]
        for rule, stacked in (*by_tensor, *by_path):
            expert = None if stacked or not rule.per_expert else numbers[1]
            found.setdefault(rule.path, _explanation(rule, numbers[0] if numbers else None, expert))
        return tuple(found.values())

    def _close(self, key: str) -> list[str]:
        """Names that come close within their layer; of equal ones that with the prefix of ``key``, else of a layer."""
        import difflib

        def split(text: str) -> tuple[str, str]:
            prefix = next((prefix for prefix in _PREFIXES if text.startswith(prefix)), "")
            return prefix, text.removeprefix(prefix)

        mine, rest = split(key)
        every = {text for table in self._index.values() for text in table} | {*self._by_path}
        by_rest: dict[str, str] = {}
        order = (*_PREFIXES, "")
        for text in sorted(every, key=lambda text: (split(text)[0] != mine, order.index(split(text)[0]), text)):
            by_rest.setdefault(split(text)[1], text)
        close = difflib.get_close_matches(rest, list(by_rest), n=4, cutoff=0.3)
        return [by_rest[found].replace("{}", "N", 1).replace("{}", "E") for found in close]


#: Prefixes of a parameter's name within its layer, stage or block.
_PREFIXES = ("layers.{}.", "mtp.{}.", "model.layers.{}.", "vision.blocks.{}.")


def _open_template(name: str) -> tuple[str, tuple[int | None, ...]]:
    """As :func:`template`, with ``N`` and ``E``, as tables print them, for numbers that are left open: None."""
    key, numbers = template(name)
    parts, given = key.split("."), iter(numbers)
    filled = tuple(next(given) if part == "{}" else None for part in parts if part in ("{}", "N", "E"))
    return ".".join("{}" if part in ("N", "E") else part for part in parts), filled


def _explanation(rule: Rule, number: int | None, expert: int | None) -> Explanation:
    """``number`` is that of the layer, stage or block."""

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


def layer_of(name: str) -> int | None:
    """The backbone layer that a tensor of any dialect belongs to; None for those of the model level and of stages."""
    key, numbers = template(name)
    return numbers[0] if key.startswith(("layers.{}.", "model.layers.{}.")) else None


def stage_of(name: str) -> int | None:
    """The stage after the backbone (``mtp.N``) that a tensor belongs to; None for every other."""
    if not name.startswith("mtp."):
        return None
    key, numbers = template(name)
    return numbers[0] if key.startswith("mtp.{}.") else None


def parameters(config: Config, layers: Iterable[int] | None = None) -> Iterator[tuple[str, Rule, int | None]]:
    """Every parameter of the model, or of the chosen layers and stages and the model level: path, rule, layer.

    Stages and vision blocks are numbered on from the layers (:meth:`Section.members`).
    """
    chosen = None if layers is None else tuple(layers)
    for section in Section if chosen is None else (Section.MODEL, Section.LAYERS, Section.STAGES):
        members = section.members(config)
        rules = config.names.of(section)
        for rule in rules:
            if not rule.numbered and rule.when.holds(config, section.first(config)):
                yield rule.path, rule, None
        for member in members if chosen is None else (layer for layer in chosen if layer in members):
            for rule in rules:
                if rule.numbered and rule.when.holds(config, member):
                    yield rule.path.format(*rule.numbers(config, member)), rule, member


def located(config: Config, path: str) -> tuple[Rule, int | None]:
    """The row and the layer of a parameter, as :func:`parameters` gives them. Raises as :meth:`NameTable.rule_of`."""
    rule = config.names.rule_of(path)
    return rule, rule.section.first(config) + template(path)[1][0] if rule.numbered else None


def check_layers(config: Config, layers: Iterable[int | str] | None, *, stages: bool = False) -> tuple[int, ...]:
    """The chosen layers, sorted; all of them for None, without stages.

    With ``stages`` these may be chosen too, by number or by names such as ``mtp.0``.

    Raises:
        UsageError: a layer that does not exist.
    """
    if layers is None:
        return tuple(range(config.num_hidden_layers))
    names = {config.prefix(layer).removesuffix("."): layer for layer in config.stage_layers} if stages else {}
    found = {names.get(layer, layer) if isinstance(layer, str) else layer for layer in layers}
    chosen = sorted(layer for layer in found if not isinstance(layer, str))
    wrong = [layer for layer in chosen if layer not in range(config.num_hidden_layers + len(names))]
    unknown = sorted(layer for layer in found if isinstance(layer, str))
    if wrong or unknown or not chosen:
        of_stages = f", and the draft stages {', '.join(names)}" if names else " (draft stages are not layers)"
        raise UsageError(
            f"layer{'' if len(wrong) + len(unknown) == 1 else 's'} {', '.join(unknown) or ranges(wrong)}: this model "
            f"has the layers 0 to {config.num_hidden_layers - 1}{of_stages}"
        )
    return tuple(chosen)
