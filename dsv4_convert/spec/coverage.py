"""Does a checkpoint fit the model? Every tensor has exactly one use, every parameter is filled exactly once.

The proof is made from names, dtypes and shapes alone, before any weight is read, with the rows of
:mod:`dsv4_convert.spec.names`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from dsv4_convert.errors import BadInput, listed
from dsv4_convert.show.units import number_of
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import Dialect, Kind, Rule, Section, Use, check_layers, parameters, stage_of
from dsv4_convert.spec.unsupported import refuse_unsupported

#: Stored dtypes (safetensors spelling) that each kind accepts, without and with a scale tensor beside it.
_PLAIN_DTYPES = frozenset({"BF16", "F32"})
_ACCEPTED: dict[Kind, tuple[frozenset[str], frozenset[str]]] = {
    Kind.LINEAR: (_PLAIN_DTYPES, frozenset({"F8_E4M3"})),
    Kind.EXPERT: (_PLAIN_DTYPES, frozenset({"F8_E4M3", "I8", "U8"})),
    Kind.PLAIN: (_PLAIN_DTYPES, frozenset()),
    Kind.NORM: (_PLAIN_DTYPES, frozenset()),
    Kind.FLOAT32: (frozenset({"F32"}), frozenset()),
    Kind.INTEGER: (frozenset({"I64", "I32"}), frozenset()),
}
_SCALE_DTYPES = frozenset({"F8_E8M0", "F32"})
_PACKED = frozenset({"I8", "U8"})


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a checkpoint stores one tensor: safetensors dtype name and stored shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensor(s) that one parameter, or one expert of a stack, is made of.

    Attributes:
        weight: the tensor of the numbers, or of their codes.
        scale: the tensor of the codes' scales; None for numbers.
        block: ``[out, in]`` elements that share a scale; None without scales.
    """

    weight: str
    scale: str | None = None
    block: tuple[int, int] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The weight, and its scales where it has some."""
        return (self.weight,) if self.scale is None else (self.weight, self.scale)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of the model with the tensors that fill it.

    ``sources`` has one entry per expert for a stack, one for everything else; a fused stack has one entry for all.
    """

    path: str
    rule: Rule
    layer: int | None
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    sources: tuple[Source, ...]
    fused: bool = False

    @property
    def stacked(self) -> bool:
        """Whether the parameter is a stack of experts filled from one tensor per expert."""
        return self.rule.per_expert and not self.fused


@dataclasses.dataclass(frozen=True)
class Resolution:
    """The proof for one checkpoint: every leaf with its sources.

    ``config`` is the architecture of what is resolved: it counts the stages after the backbone that are part of it.
    """

    config: Config
    dialect: Dialect
    leaves: tuple[Leaf, ...]


def resolve(
    stored: Mapping[str, Stored],
    config: Config,
    *,
    layers: Iterable[int] | None = None,
    dialect: Dialect | None = None,
    where: str = "checkpoint",
) -> Resolution:
    """Prove that the tensors of a checkpoint and the parameters of the model cover each other exactly.

    With ``layers`` only those and the model-level parameters are asked for; tensors of other layers, and of the stages
    after the backbone, are neither used nor required, but they still have to be known names. A checkpoint may have no
    stages at all, although its config counts them; if it has a tensor of one, it has to have all.

    Raises:
        BadInput: unknown, missing or superfluous tensors, wrong shapes or dtypes, weights without scale and scales
            without weight, all of them in one message; or a model that is not supported
            (:func:`~dsv4_convert.spec.unsupported.refuse_unsupported`).
    """
    refuse_unsupported({"model_type": config.model_type}, stored, where=where)
    resolution, problems = compare(stored, config, layers=layers, dialect=dialect)
    if problems:
        raise BadInput(
            f"{where}: {number_of(len(problems), 'problem')} between its tensors ({resolution.dialect} names) and its "
            f"config.json:\n{listed(problems)}\n"
            "Compare with the repository's file list; a fresh `dsv4 download` fetches what is missing."
        )
    return resolution


def compare(
    stored: Mapping[str, Stored],
    config: Config,
    *,
    layers: Iterable[int] | None = None,
    dialect: Dialect | None = None,
) -> tuple[Resolution, list[str]]:
    """Like :func:`resolve`, but returns the problems instead of raising: sorted, each ``name: what is wrong``.

    Raises:
        BadInput: no name is known to any dialect.
    """
    dialect = dialect or config.names.detect_dialect(stored)
    chosen = check_layers(config, layers)
    problems: list[str] = []
    fitted = config
    if layers is not None or all(stage_of(name) is None for name in stored):
        fitted = config.without_stages()
    for name in stored:
        uses = config.names.lookup(name, dialect)
        if uses:
            problems += _misplaced(name, uses[0], config)
        else:
            problems.append(f"{name}: unknown tensor {_describe(stored[name])}")

    used: set[str] = set()
    leaves = []
    for path, rule, layer in parameters(fitted, None if layers is None else chosen):
        leaf = _leaf(path, rule, layer, fitted, dialect, stored)
        problems += _check_leaf(leaf, fitted, stored)
        for source in leaf.sources:
            used.add(source.weight)
            if source.scale is not None:
                used.add(source.scale)
        leaves.append(leaf)
    for name in stored.keys() - used:
        uses = config.names.lookup(name, dialect)
        section = uses[0].rule.section if uses else None
        asked = section is Section.MODEL or (uses[0].layer in chosen if section is Section.LAYERS else layers is None)
        if uses and asked and not _misplaced(name, uses[0], config):
            what = "scale without a quantised weight" if uses[0].is_scale else "tensor that nothing uses"
            problems.append(f"{name}: {what}")
    return Resolution(fitted, dialect, tuple(leaves)), sorted(problems)


def _describe(stored: Stored) -> str:
    return f"{stored.dtype} {list(stored.shape)}"


def _misplaced(name: str, use: Use, config: Config) -> list[str]:
    """A known name in a place where this model has no such parameter."""
    section, number = use.rule.section, use.number
    if number is not None and number >= len(section.members(config)):
        if section is Section.LAYERS:
            return [f"{name}: the config has only {config.num_hidden_layers} layers"]
        return [f"{name}: the config has {len(section.members(config)) or 'no'} {_members(section, config)}"]
    member = section.first(config) + (number or 0)
    if not use.rule.when.holds(config, member):
        if section is Section.LAYERS:
            kind = config.describe(member)
            return [f"{name}: exists in {use.rule.when.label} layers only, layer {member} is {kind}"]
        if section is Section.STAGES:
            of = "mtp" if config.dspark is None else "DSpark"
            return [f"{name}: exists in {use.rule.when.label} stages only, and this is stage {number} of {of}"]
        return [f"{name}: the config has no {section}"]
    if use.expert is not None and use.expert >= config.experts_of(member):
        return [f"{name}: the config has only {config.experts_of(member)} experts"]
    return []


def _members(section: Section, config: Config) -> str:
    if section is Section.VISION:
        return "vision blocks"
    return "mtp stages" if config.dspark is None else "DSpark stages"


def _leaf(
    path: str, rule: Rule, layer: int | None, config: Config, dialect: Dialect, stored: Mapping[str, Stored]
) -> Leaf:
    fused = (
        dialect is Dialect.MODULE
        and rule.fused is not None
        and layer is not None
        and rule.fused.format(layer) in stored
    )
    shape, target = rule.source_shape(config, layer), rule.target_shape(config, layer)
    if fused and rule.fused is not None:
        sources: tuple[Source, ...] = (Source(rule.fused.format(layer)),)
    else:
        experts = range(config.experts_of(layer)) if rule.per_expert else (None,)
        sources = tuple(_source(rule, dialect, rule.numbers(config, layer, expert), stored) for expert in experts)
    return Leaf(path, rule, layer, shape, target, sources, fused)


def _source(rule: Rule, dialect: Dialect, numbers: tuple[int, ...], stored: Mapping[str, Stored]) -> Source:
    weight, template = rule.template(dialect).format(*numbers), rule.scale_template(dialect)
    scale = None if template is None else template.format(*numbers)
    if scale not in stored:
        return Source(weight)
    return Source(weight, scale, rule.block(packed=weight in stored and stored[weight].dtype in _PACKED))


def _check_leaf(leaf: Leaf, config: Config, stored: Mapping[str, Stored]) -> Iterator[str]:
    """Presence, dtype and shape of every source of one parameter."""
    rule = leaf.rule
    bare, scaled = _ACCEPTED[rule.kind]
    forms = set()
    for source in leaf.sources:
        weight = stored.get(source.weight)
        if weight is None:
            yield f"{source.weight}: missing (fills {leaf.path})"
            continue
        scale = stored[source.scale] if source.scale is not None else None
        accepted = scaled if scale is not None else bare
        forms.add((weight.dtype, scale.dtype if scale is not None else None))
        if weight.dtype not in accepted:
            if scale is None and weight.dtype in scaled:
                yield f"{source.weight}: {weight.dtype} codes without their scale tensor"
            else:
                wanted_dtypes = " or ".join(sorted(accepted)) or "no scale"
                beside = "with a scale" if scale is not None else "without a scale"
                yield f"{source.weight}: expected {wanted_dtypes} {beside}, found {weight.dtype}"
            continue
        wanted = leaf.source_shape
        packed = weight.dtype in _PACKED
        if packed:
            wanted = (wanted[0], -(-wanted[1] // 2))
        if leaf.fused:
            wanted = (config.experts_of(leaf.layer), wanted[0] * (2 if rule.half is not None else 1), wanted[1])
        if weight.shape != wanted:
            yield f"{source.weight}: expected shape {list(wanted)}, found {_describe(weight)}"
        if scale is not None and source.block is not None:
            tiles = tuple(-(-size // step) for size, step in zip(leaf.source_shape, source.block, strict=True))
            if scale.dtype not in _SCALE_DTYPES or scale.shape != tiles:
                yield f"{source.scale}: expected F8_E8M0 or F32 {list(tiles)}, found {_describe(scale)}"
            if config.weight_block_size is None:
                yield f"{source.weight}: quantised, but config.json has no quantization_config to say in which blocks"
        if rule.kind is Kind.EXPERT and scale is not None and config.expert_dtype is not None:
            declared = {"fp4": True, "fp8": False}[config.expert_dtype]
            if declared != packed:
                yield f"{source.weight}: config.json declares {config.expert_dtype} experts, found {_describe(weight)}"
    if len(forms) > 1:
        yield f"{leaf.path}: its experts are stored in different forms: {sorted(map(str, forms))}"
