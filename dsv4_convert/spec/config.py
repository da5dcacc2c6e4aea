"""The architecture of one model of the family, read from a ``config.json``.

:class:`Config` has what all architectures share. Each one has a subclass, such as
:class:`~dsv4_convert.spec.v4.config.V4Config`, which is the architecture: it names the tables of its tensors and of its
taps. Code that has a config has all facts, and need not ask which model it is.

A config refuses what it does not know: a field that could change the mathematics is never skipped, and all problems are
reported at once.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeAlias

from dsv4_convert.errors import BadInput, listed
from dsv4_convert.files.strict_json import enumerated, parse_object
from dsv4_convert.folders import CONFIG_FILE, PathLike

if typing.TYPE_CHECKING:
    from dsv4_convert.spec.names import NameTable
    from dsv4_convert.spec.tap import Tap

#: Sizes are below this; the largest of the releases is the context of V4-Pro, a million.
MAX_SIZE = 1 << 31

#: An integer that may be zero; all others of a config are positive.
Count: TypeAlias = Annotated[int, "from 0"]

#: Where stored JSON says which architecture it is.
_ARCHITECTURE = "architecture"
#: Values that stored JSON leaves out, so that a config that dsv4 0.1 knew has the bytes, and the digest, that it had.
_LEFT_OUT: Mapping[str, Any] = {_ARCHITECTURE: "deepseek_v4", "dspark": None, "vision": None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN context extension of the compressed layers' rotary table. No attention factor: the model applies none."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSpark:
    """The draft of a release: all stages together draft a block of tokens, from the streams of some layers.

    Field names are those of the published ``config.json`` without ``dspark_``.
    """

    block_size: int
    #: The token that stands for every token of the block but the first, which is known.
    noise_token_id: Count
    #: Backbone layers whose streams the draft reads.
    target_layer_ids: tuple[Count, ...]
    markov_rank: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ABC):
    """Every architecture number of one model. Field names are those of the published ``config.json``.

    The stages after the backbone (``mtp.N``) are counted: they are window-only, score-routed blocks in every release.
    They predict the token after the next (multi-token prediction), or draft blocks of tokens where ``dspark`` is there.
    A stage has the layer number ``num_hidden_layers + stage``, as in the published ``compress_ratios``. All methods
    that take a layer accept these numbers too.

    Examples:
        >>> config = Config.from_file(Path("checkpoint/config.json"))
        >>> config.num_hidden_layers
        4
    """

    #: ``model_type`` of the published file, and the name of the architecture in prose.
    model_type: ClassVar[str]
    title: ClassVar[str]
    #: ``[out, in]`` elements of an FP8 weight that share a scale.
    fp8_tile: ClassVar[tuple[int, int]]
    #: Its tensors and parameters.
    names: ClassVar[NameTable]
    #: Its taps in order of execution, and those of the state that a layer keeps between calls.
    taps: ClassVar[tuple[Tap, ...]]
    state: ClassVar[tuple[Tap, ...]]
    #: Names of the taps whose values are FP4 in release numerics.
    fp4_taps: ClassVar[tuple[str, ...]]

    vocab_size: int
    hidden_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    n_routed_experts: int
    num_experts_per_tok: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    routed_scaling_factor: float
    swiglu_limit: float
    rope_theta: float
    compress_rope_theta: float
    yarn: Yarn | None
    max_position_embeddings: int
    num_mtp_stages: Count = 0
    dspark: DSpark | None = None
    #: Declared storage of the routed experts ("fp4", "fp8"), None where the file does not say (the first V4-Flash
    #: revision): then the tensors themselves tell.
    expert_dtype: str | None = None
    #: Tile of an FP8 weight that shares one scale, None for an unquantised checkpoint.
    weight_block_size: tuple[int, int] | None = None

    @classmethod
    @abstractmethod
    def read(cls, raw: Mapping[str, Any], *, where: str) -> Self:
        """Build from the JSON of a ``config.json`` of this ``model_type``. Raises as :meth:`from_hf`."""

    @abstractmethod
    def layer_kind(self, layer: int) -> Hashable:
        """All that decides the operations of a layer: layers of one kind can share a program."""

    @abstractmethod
    def describe(self, layer: int) -> str:
        """The kind of a layer in words."""

    @abstractmethod
    def abbreviate(self, layer: int) -> str:
        """The kind of a layer's attention in a few letters, for tables."""

    def own_numbers(self) -> Iterator[tuple[str, str]]:
        """The key numbers that only this architecture has: a title, and the number in words."""
        yield from ()

    @abstractmethod
    def ratio_of(self, layer: int) -> int:
        """Tokens per compressed entry that a layer attends to; 0 if it attends to its window only."""

    @abstractmethod
    def of_layers(self, layers: Sequence[int]) -> Self:
        """The architecture with some of its layers only, in this order, and without stages after the backbone."""

    @abstractmethod
    def compresses(self, layer: int) -> bool:
        """Whether a layer has a compressor of its own."""

    @abstractmethod
    def compressor_width(self, layer: int) -> int:
        """Values per token that the compressor of a layer pools."""

    @abstractmethod
    def indexes(self, layer: int) -> bool:
        """Whether a layer has an indexer of its own."""

    @abstractmethod
    def chooses(self, layer: int) -> bool:
        """Whether a layer attends to some of the compressed entries only, whoever chose them."""

    def table_of(self, layer: int) -> str | None:
        """The path of the table in which a layer or stage looks up rows, too large to have all of it; None without.

        A stage that embeds tokens looks up embeddings.
        """
        return "embed" if self.embeds(layer) else None

    @property
    def entries_per_candidate(self) -> int:
        """Entries in a block of which a layer chooses some for later layers; 0 where none does."""
        return 0

    def tap_sizes(self, entries: int) -> Mapping[str, int]:
        """Sizes of the shape letters of taps that only this architecture has, where there are so many entries."""
        return {}

    def hashed(self, layer: int) -> bool:
        """Whether a layer chooses experts by the token's id."""
        return False

    @property
    def of_stages(self) -> Self:
        """The architecture as the stages after the backbone have it."""
        return self

    def experts_of(self, layer: int | None) -> int:
        """Number of routed experts of a layer or stage."""
        return (self.of_stages if layer in self.stage_layers else self).n_routed_experts

    def chosen_experts_of(self, layer: int | None) -> int:
        """Number of routed experts that a layer or stage chooses for a token."""
        return (self.of_stages if layer in self.stage_layers else self).num_experts_per_tok

    def step(self, layer: int | None) -> str:
        """A layer, a stage or the model level as progress names it: ``layer 12 of 43``, ``stage mtp.0``."""
        if layer is None:
            return "model level"
        if layer in self.stage_layers:
            return f"stage {self.prefix(layer).removesuffix('.')}"
        return f"layer {layer} of {self.num_hidden_layers}"

    def prefix(self, layer: int) -> str:
        """The beginning of the paths of a layer's or stage's parameters: ``layers.12.``, ``mtp.0.``."""
        return prefix_of(layer, layer - self.num_hidden_layers if layer in self.stage_layers else None)

    def without_stages(self) -> Self:
        """The backbone alone."""
        return dataclasses.replace(self, num_mtp_stages=0, dspark=None)

    @property
    def stage_layers(self) -> range:
        """The layer numbers of the stages after the backbone."""
        return range(self.num_hidden_layers, self.num_hidden_layers + self.num_mtp_stages)

    def embeds(self, layer: int) -> bool:
        """Whether the layer number is that of a stage that embeds tokens: an mtp stage, or the first of DSpark's."""
        return layer in (self.stage_layers if self.dspark is None else self.stage_layers[:1])

    def has_head(self, layer: int) -> bool:
        """Whether the layer number is that of a stage with a head: an mtp stage, or the last of DSpark's."""
        return layer in (self.stage_layers if self.dspark is None else self.stage_layers[-1:])

    def drafts_blocks(self, layer: int | None) -> bool:
        """Whether the layer number is that of a DSpark stage."""
        return self.dspark is not None and layer in self.stage_layers

    @property
    def draft_tokens(self) -> int:
        """How many tokens the stages draft at a time: one, or a block of DSpark's."""
        return 1 if self.dspark is None else self.dspark.block_size

    @property
    def draft_sources(self) -> tuple[int, ...]:
        """The backbone layers whose streams the stages read: the last one, or DSpark's targets."""
        return (self.num_hidden_layers - 1,) if self.dspark is None else self.dspark.target_layer_ids

    def draft_tap(self, layer: int) -> str:
        """The streams that the stages read of a layer, by the name of their tap within it: those that leave it."""
        return "hc_ffn.streams"

    @property
    def num_vision_blocks(self) -> int:
        """Number of blocks of the vision encoder; 0 without one."""
        return 0

    @property
    def maps_tokens(self) -> bool:
        """Whether the model itself needs the checkpoint's tokenizer: it maps tokens by their text."""
        return False

    @property
    def hc_mixes(self) -> int:
        """Rows of a hyper-connection's ``fn``: N for pre, N for post, N*N for comb."""
        return (2 + self.hc_mult) * self.hc_mult

    def computes_like(self, other: Config) -> bool:
        """Whether both are the same, except for the stages after the backbone, which a conversion may leave out."""
        return self.without_stages() == other.without_stages()

    @classmethod
    def from_file(cls, path: PathLike) -> Config:
        """Read a ``config.json``, given itself or its folder.

        Raises:
            BadInput: names the file and every problem in it.
        """
        path = Path(path)
        if path.is_dir():
            path = path / CONFIG_FILE
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            raise BadInput(f"{path}: no such file; a checkpoint needs its config.json beside the shards") from None
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
        return Config.from_hf(parse_object(text, where=str(path)), where=str(path))

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], *, where: str = "config.json") -> Config:
        """Build from the parsed JSON of a published ``config.json`` or of one that transformers wrote.

        Raises:
            BadInput: another model; or unknown, missing, unsupported or contradicting fields, all of them in one
                message.
        """
        from dsv4_convert.spec.architectures import BY_MODEL_TYPE

        if not isinstance(raw, Mapping):
            raise BadInput(f"{where}: expected a JSON object, found {type(raw).__name__}")
        if "dim" in raw and "n_layers" in raw:
            raise BadInput(
                f"{where}: this is the config of DeepSeek's inference code (inference/config.json); "
                "pass the config.json at the top of the repository"
            )
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in BY_MODEL_TYPE:
            found = "no model_type" if model_type is None else f"model_type {model_type!r}"
            raise BadInput(
                f"{where}: expected model_type {' or '.join(map(repr, BY_MODEL_TYPE))}, found {found}; dsv4 converts "
                "DeepSeek-V4 (Flash, Pro, their Base and dated releases) and V4.1-Flash, other architectures are not "
                "supported"
            )
        return BY_MODEL_TYPE[model_type].read(raw, where=where)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; :meth:`from_json` is the inverse."""
        values = {_ARCHITECTURE: self.model_type, **dataclasses.asdict(self)}
        return {name: value for name, value in values.items() if name not in _LEFT_OUT or value != _LEFT_OUT[name]}

    @classmethod
    def from_json(cls, data: object) -> Config:
        """Rebuild what :meth:`to_json` wrote.

        Raises:
            BadInput: anything else.
        """
        from dsv4_convert.spec.architectures import BY_MODEL_TYPE

        if not isinstance(data, Mapping):
            raise BadInput(f"stored dsv4 config: expected an object, found {short(data)}; the file is damaged")
        if written := [name for name, value in _LEFT_OUT.items() if name in data and data[name] == value]:
            raise BadInput(f"stored dsv4 config: {', '.join(written)} would have been left out; the file is damaged")
        values = {**_LEFT_OUT, **data}
        model_type = values.pop(_ARCHITECTURE)
        known = BY_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None
        if known is None:
            raise BadInput(
                f"stored dsv4 config: architecture is {short(model_type)}, this version of dsv4 knows "
                f"{' and '.join(BY_MODEL_TYPE)}; read it with the version that wrote it"
            )
        if differing := sorted({*values} ^ {field.name for field in dataclasses.fields(known)}):
            raise BadInput(f"stored dsv4 config: missing or unknown fields: {differing}; the file is damaged")
        problems: list[str] = []
        config = _stored(known, values, "", problems)
        if not problems:
            problems += config.inconsistent()
        if problems:
            raise BadInput(f"stored dsv4 config: not one that dsv4 writes; the file is damaged:\n{listed(problems)}")
        return config

    def inconsistent(self) -> list[str]:
        """The fields that contradict others, each with what it says; none in a config that was read from a file."""
        problems = []
        if self.expert_dtype not in (None, "fp4", "fp8"):
            problems.append(f"expert_dtype: {short(self.expert_dtype)}")
        targets = () if self.dspark is None else self.dspark.target_layer_ids
        if self.dspark is not None and (not targets or self.unordered(targets)):
            problems.append(f"dspark_target_layer_ids: expected ascending layers, found {short(list(targets))}")
        return problems

    def unordered(self, layers: Sequence[int]) -> bool:
        """Whether these are not ascending layers of the backbone."""
        return list(layers) != sorted(set(layers)) or any(layer >= self.num_hidden_layers for layer in layers)


#: The beginning of the names of a draft stage; its number follows.
STAGE = "mtp."


def prefix_of(layer: int | None, stage: int | None) -> str:
    """The beginning of the names of a layer, of a stage by its own number, or of the model level (both None)."""
    if stage is not None:
        return f"{STAGE}{stage}."
    return "" if layer is None else f"layers.{layer}."


def _stored(kind: type[Any], values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    """An instance of a dataclass out of stored JSON; the fields that no config has so go to ``problems``."""
    found = {}
    # The tables of an architecture are no fields, and their classes are known to type checkers only.
    hints = typing.get_type_hints(kind, localns={"NameTable": Any, "Tap": Any}, include_extras=True)
    for field in dataclasses.fields(kind):
        name = f"{prefix}{field.name}"
        try:
            found[field.name] = _decoded(hints[field.name], values[field.name], name, problems)
        except (KeyError, TypeError, ValueError):
            problems.append(f"{name}: {short(values.get(field.name))}")
    return None if problems else kind(**found)


def _decoded(hint: Any, value: Any, name: str, problems: list[str]) -> Any:
    """A value of a field. Raises :class:`ValueError` or :class:`TypeError` for one of another type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _decoded(arguments[0], value, name, problems)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return tuple(_decoded(kind, each, name, problems) for kind, each in zip(kinds, value, strict=True))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping) or set(value) != {field.name for field in dataclasses.fields(hint)}:
            raise TypeError
        return _stored(typing.cast(type[Any], hint), value, f"{name}.", problems)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        try:
            return enumerated(value, hint, field=name)
        except ValueError as error:
            problems.append(str(error))
            return None
    least = {int: 1, Count: 0}.get(hint)
    if least is not None:
        good = type(value) is int and least <= value < MAX_SIZE
    elif hint is float:
        good = type(value) is float and 0 < value < math.inf
    else:
        good = type(value) is hint
    if not good:
        raise ValueError
    return value


def short(value: Any) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
