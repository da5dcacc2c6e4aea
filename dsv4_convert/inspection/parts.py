"""The part of the model that a parameter belongs to, and the parameters and bytes of each part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from dsv4_convert.spec.config import Config
from dsv4_convert.spec.coverage import Stored
from dsv4_convert.spec.names import Dialect, Kind, NameTable, Rule, Section, parameters


class ModelPart(StrEnum):
    """A part of the model, in the order in which they are shown."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    COMPRESSOR = "compressor"
    INDEXER = "indexer"
    HYPER = "hyper-connections"
    NORMS = "norms"
    ROUTER = "router"
    ROUTED = "routed experts"
    SHARED = "shared experts"
    HEAD = "head"
    ENGRAM = "engram"
    DRAFTS = "draft stages"
    VISION = "vision"
    UNKNOWN = "unknown"


_COMPRESSOR = ("ape", "wkv", "wgate", "norm")
_HYPER = ("fn", "base", "scale")

#: THE table: part -> parameters by path; those of layers without ``layers.{}.``. A stage, and the vision encoder, are
#: one part as a whole.
PARTS: Mapping[ModelPart, tuple[str, ...]] = {
    ModelPart.EMBEDDING: ("embed",),
    ModelPart.ATTENTION: (
        *("attn.wq_a", "attn.q_norm", "attn.wq_b", "attn.wkv", "attn.kv_norm"),
        *("attn.attn_sink", "attn.wo_a", "attn.wo_b"),
    ),
    ModelPart.COMPRESSOR: tuple(f"attn.compressor.{name}" for name in _COMPRESSOR),
    ModelPart.INDEXER: (
        *("attn.indexer.wq_b", "attn.indexer.weights_proj"),
        *("attn.indexer.wk", "attn.indexer.k_norm"),
        *(f"attn.indexer.compressor.{name}" for name in _COMPRESSOR),
    ),
    ModelPart.HYPER: tuple(f"{half}_{name}" for half in ("hc_attn", "hc_ffn", "hc_head") for name in _HYPER),
    ModelPart.NORMS: ("attn_norm", "ffn_norm", "norm"),
    ModelPart.ROUTER: ("ffn.gate.weight", "ffn.gate.bias", "ffn.gate.bias_vl", "ffn.gate.tid2eid"),
    ModelPart.ROUTED: tuple(f"ffn.experts.w{number}" for number in (1, 2, 3)),
    ModelPart.SHARED: tuple(f"ffn.shared_experts.w{number}" for number in (1, 2, 3)),
    ModelPart.HEAD: ("head",),
    ModelPart.ENGRAM: tuple(f"engram.{name}" for name in ("embed", "wkv", "q_weight", "k_weight")),
}
_PART_OF = {path: part for part, paths in PARTS.items() for path in paths}
_PART_OF_SECTION = {Section.STAGES: ModelPart.DRAFTS, Section.VISION: ModelPart.VISION}


def part_of(rule: Rule) -> ModelPart:
    """The part of the model that a parameter belongs to."""
    return _PART_OF_SECTION.get(rule.section) or _PART_OF[rule.path.removeprefix("layers.{}.")]


@dataclass(frozen=True, kw_only=True)
class PartRow:
    """The stored tensors of one part in one dtype. Scales add bytes to their weights, and no parameters."""

    part: ModelPart
    dtype: str
    tensors: int
    parameters: int
    nbytes: int


class Census:
    """Counts stored tensors by part and dtype."""

    def __init__(self) -> None:
        self._cells: dict[tuple[ModelPart, str], list[int]] = {}

    def add(self, part: ModelPart, dtype: str, *, parameters: int, nbytes: int) -> None:
        """Count one tensor."""
        cell = self._cells.setdefault((part, dtype), [0, 0, 0])
        for at, number in enumerate((1, parameters, nbytes)):
            cell[at] += number

    @property
    def rows(self) -> tuple[PartRow, ...]:
        """One row for each part and dtype, in the order of the parts."""
        order = list(ModelPart)
        return tuple(
            PartRow(part=part, dtype=dtype, tensors=cell[0], parameters=cell[1], nbytes=cell[2])
            for (part, dtype), cell in sorted(
                self._cells.items(), key=lambda item: (order.index(item[0][0]), item[0][1])
            )
        )


def elements(rule: Rule, shape: Iterable[int], *, packed: bool, scale: bool) -> int:
    """The parameters that a stored tensor holds: none in a scale or a table of numbers, two in a byte of packed FP4."""
    if scale or rule.kind is Kind.INTEGER:
        return 0
    return math.prod(shape) * (2 if packed else 1)


def count_published(
    stored: Mapping[str, Stored], nbytes: Mapping[str, int], names: NameTable, dialect: Dialect | None
) -> tuple[PartRow, ...]:
    """Count the contents of a checkpoint by its headers; unknown names form a part of their own.

    ``nbytes`` are the stored bytes of every tensor, ``names`` the table of its architecture. Without a dialect, every
    name is unknown.
    """
    census = Census()
    for name, tensor in stored.items():
        uses = names.lookup(name, dialect) if dialect is not None else ()
        if not uses:
            part, parameters = ModelPart.UNKNOWN, 0
        else:
            part, packed = part_of(uses[0].rule), uses[0].rule.per_expert and tensor.dtype in ("I8", "U8")
            parameters = elements(uses[0].rule, tensor.shape, packed=packed, scale=uses[0].is_scale)
        census.add(part, tensor.dtype, parameters=parameters, nbytes=nbytes[name])
    return census.rows


def not_run(config: Config) -> dict[str, str]:
    """The parts of a model that dsv4 converts and does not compute, as a fact about it."""
    if not config.num_vision_blocks:
        return {}
    return {"not run": "the vision encoder, and what routes image tokens: stored and given back as they are"}


@dataclass(frozen=True, kw_only=True)
class Totals:
    """The size of the architecture, however much of it is stored.

    Attributes:
        total: parameters of the backbone: all layers, embedding and head, but no n-gram tables. V4.1-Flash has 552B.
        active: those that one token is multiplied with: of the routed experts the chosen ones; no table of which a
            token takes some rows, as the embedding. DeepSeek's 13B of V4-Flash and 49B of V4-Pro are counted so.
        tables: parameters of the n-gram tables.
        mtp: parameters of the stages after the backbone.
        vision: parameters of the vision encoder.
    """

    total: int
    active: int
    tables: int
    mtp: int
    vision: int

    @classmethod
    def of(cls, config: Config) -> Totals:
        """Count the parameters of an architecture."""
        found = dict.fromkeys(("total", "active", "tables", "mtp", "vision"), 0)
        beside = {ModelPart.DRAFTS: "mtp", ModelPart.VISION: "vision"}
        for path, rule, layer in parameters(config):
            number = elements(rule, rule.target_shape(config, layer), packed=False, scale=False)
            part = part_of(rule)
            name = "tables" if rule.path == "layers.{}.engram.embed" else beside.get(part, "total")
            found[name] += number
            if part is ModelPart.ROUTED:
                found["active"] += number * config.num_experts_per_tok // config.n_routed_experts
            elif name == "total" and path != "embed":
                found["active"] += number
        return cls(**found)
