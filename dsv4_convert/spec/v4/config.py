"""The architecture of DeepSeek-V4: Flash, Pro, their Base variants and their dated releases.

The published files are understood and what transformers writes, in both spellings of the layer schedule
(``compress_ratios`` or ``layer_types``), of hash routing (``num_hash_layers`` or ``mlp_layer_types``) and of the rotary
tables (``rope_scaling`` or ``rope_parameters``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar

from dsv4_convert.errors import BadInput
from dsv4_convert.spec.config import MAX_SIZE, Config, short
from dsv4_convert.spec.fields import FIXED, REALS, SIZES, Fields
from dsv4_convert.spec.v4.kinds import AttentionKind
from dsv4_convert.spec.v4.names import FP8_TILE, NAMES
from dsv4_convert.spec.v4.taps import STATE, TAPS
from dsv4_convert.spec.vision import VisionConfig

_V = TypeVar("_V")

#: ``compress_ratios`` of the published files -> kind of attention.
_KIND_OF_RATIO = {0: AttentionKind.SLIDING, 4: AttentionKind.CSA, 128: AttentionKind.HCA}

_HASH, _LEARNED = "hash_moe", "moe"

#: Further fields with exactly one supported value; absent means that value.
_FIXED = FIXED | {"model_type": "deepseek_v4", "mlp_bias": False, "is_encoder_decoder": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class V4Config(Config):
    """Every architecture number of a DeepSeek-V4.

    Per-layer facts are tuples of length ``num_hidden_layers``: ``attention`` and ``hash_routed``. Stages after the
    backbone are window-only and score-routed.
    """

    model_type = "deepseek_v4"
    title = "DeepSeek-V4"
    fp8_tile = FP8_TILE
    names = NAMES
    taps = TAPS
    state = STATE
    fp4_taps = ("attn.indexer.q_rope", "attn.indexer.compressor.entries")

    attention: tuple[AttentionKind, ...]
    hash_routed: tuple[bool, ...]
    csa_ratio: int = 4
    hca_ratio: int = 128
    vision: VisionConfig | None = None

    @property
    def num_vision_blocks(self) -> int:
        """Number of blocks of the vision encoder; 0 without one."""
        return 0 if self.vision is None else self.vision.num_hidden_layers

    def ratio(self, kind: AttentionKind) -> int:
        """Tokens per compressed entry of a layer of this kind; 0 without a compressor."""
        return {AttentionKind.SLIDING: 0, AttentionKind.CSA: self.csa_ratio, AttentionKind.HCA: self.hca_ratio}[kind]

    def ratio_of(self, layer: int) -> int:
        """Tokens per compressed entry of a layer; 0 without a compressor."""
        return self.ratio(self.kind(layer))

    def kind(self, layer: int) -> AttentionKind:
        """Attention kind of a layer, or of a stage after the backbone."""
        return self.attention[layer] if layer < self.num_hidden_layers else AttentionKind.SLIDING

    def compresses(self, layer: int) -> bool:
        """Whether a layer is CSA or HCA."""
        return self.kind(layer) is not AttentionKind.SLIDING

    def compressor_width(self, layer: int) -> int:
        """Values per token that the compressor of a layer pools: twice as many in CSA, whose entries overlap."""
        return self.head_dim * (2 if self.kind(layer) is AttentionKind.CSA else 1)

    def chooses(self, layer: int) -> bool:
        """Whether a layer is CSA."""
        return self.kind(layer) is AttentionKind.CSA

    def indexes(self, layer: int) -> bool:
        """Whether a layer is CSA."""
        return self.kind(layer) is AttentionKind.CSA

    def layer_kind(self, layer: int) -> tuple[AttentionKind, bool]:
        """Attention kind, and whether experts are chosen by the token's id."""
        return self.kind(layer), self.hashed(layer)

    def abbreviate(self, layer: int) -> str:
        """SWA, CSA or HCA."""
        kind = self.kind(layer)
        return "SWA" if kind is AttentionKind.SLIDING else kind.name

    def describe(self, layer: int) -> str:
        """The kind of a layer in words."""
        return f"{self.kind(layer)}, {'hash' if self.hashed(layer) else 'learned'} routing"

    def hashed(self, layer: int) -> bool:
        """Whether a layer, or a stage after the backbone, chooses experts by the token's id."""
        return layer < self.num_hidden_layers and self.hash_routed[layer]

    def of_layers(self, layers: Sequence[int]) -> Self:
        """The architecture with some of its layers only, in this order, and without stages after the backbone."""
        return dataclasses.replace(
            self,
            num_hidden_layers=len(layers),
            num_mtp_stages=0,
            dspark=None,
            vision=None,
            attention=tuple(self.attention[layer] for layer in layers),
            hash_routed=tuple(self.hash_routed[layer] for layer in layers),
        )

    def inconsistent(self) -> list[str]:
        """The tuples that do not have one entry per layer, and what the base class finds."""
        per_layer = {"attention": self.attention, "hash_routed": self.hash_routed}
        wrong = [f"{name}: {short(value)}" for name, value in per_layer.items() if len(value) != self.num_hidden_layers]
        return [*wrong, *super().inconsistent()]

    @classmethod
    def read(cls, raw: Mapping[str, Any], *, where: str) -> Self:
        """Build from the JSON of a ``config.json`` of DeepSeek-V4. Raises :class:`BadInput` with all problems."""
        fields = Fields(raw, where)
        fields.fixed(_FIXED)
        values: dict[str, Any] = {name: fields.size(name) for name in SIZES}
        values |= {name: fields.real(name) for name in REALS}
        rates = _compress_rates(fields)
        attention, stages = _schedule(fields, values["num_hidden_layers"], rates)
        layers = len(attention)  # none where the schedule is a problem, so a wild number costs nothing
        values |= fields.rope(values)
        values |= {
            "attention": attention,
            "hash_routed": _hash_routed(fields, layers),
            "csa_ratio": rates[AttentionKind.CSA],
            "hca_ratio": rates[AttentionKind.HCA],
            "num_mtp_stages": stages,
            "dspark": fields.dspark(values["vocab_size"], layers),
            "vision": _vision(fields),
        }
        values |= fields.quantization(cls.fp8_tile)
        fields.finish()
        fields.relations(values)
        fields.refuse(cls.title)
        return cls(**values)


def as_v4(config: Config) -> V4Config:
    """The config, for code that knows DeepSeek-V4 only. Raises :class:`BadInput` for another architecture."""
    if not isinstance(config, V4Config):
        raise BadInput(f"{config.title}: transformers has no such model, so record its golden with --reference release")
    return config


def _agreed_layers(fields: Fields, said: Mapping[str, tuple[_V, ...]], default: tuple[_V, ...]) -> tuple[_V, ...]:
    """One fact about every layer. All of its names must agree; the first layer where they differ is a problem."""
    for layer, values in enumerate(zip(*said.values(), strict=True)):
        if len(set(values)) > 1:
            each = ", ".join(f"{name} says {value}" for name, value in zip(said, values, strict=True))
            fields.bad(f"{' and '.join(said)} contradict each other: of layer {layer} {each}")
            break
    return next(iter(said.values()), default)


def _vision(fields: Fields) -> VisionConfig | None:
    """The vision encoder of V4-Flash-Vision-Exp, all of whose fields are there or none."""
    if not any(name.startswith("vision_") for name in fields.left):
        return None
    return VisionConfig(
        num_hidden_layers=fields.size("vision_n_layers"),
        hidden_size=fields.size("vision_dim"),
        num_attention_heads=fields.size("vision_n_heads"),
        intermediate_size=fields.size("vision_inter_dim"),
        patch_size=fields.size("vision_patch_size"),
        downsample_ratio=fields.size("vision_downsample_ratio"),
        max_image_tokens=fields.size("vision_max_n_token"),
        min_pixels=fields.size("vision_min_pixels"),
        rope_theta=fields.real("vision_rope_theta"),
        max_wh_ratio=fields.real("vision_max_wh_ratio"),
    )


def _compress_rates(fields: Fields) -> dict[AttentionKind, int]:
    rates = {AttentionKind.CSA: 4, AttentionKind.HCA: 128}
    given = fields.left.pop("compress_rates", None)
    if given is None:
        return rates
    if not isinstance(given, Mapping) or set(given) != {kind.value for kind in rates}:
        fields.bad(f"compress_rates: expected the keys {[kind.value for kind in rates]}, found {short(given)}")
        return rates
    for kind in rates:
        value = given[kind.value]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < MAX_SIZE:
            fields.bad(f"compress_rates.{kind.value}: expected a positive integer below 2**31, found {short(value)}")
        else:
            rates[kind] = value
    return rates


def _schedule(fields: Fields, layers: int, rates: Mapping[AttentionKind, int]) -> tuple[tuple[AttentionKind, ...], int]:
    """Kind of attention per backbone layer, and the number of stages after the backbone."""
    stages = nextn = fields.count("num_nextn_predict_layers")
    spelled: dict[str, tuple[AttentionKind, ...]] = {}
    ratios = fields.left.pop("compress_ratios", None)
    if ratios is not None:
        kinds = fields.entries("compress_ratios", ratios, _KIND_OF_RATIO, at_least=layers)
        # Entries past the backbone belong to the stages after it; the schedule is the one to believe.
        if kinds is not None:
            spelled["compress_ratios"] = kinds[:layers]
            stages = max(nextn, len(kinds) - layers)
            if any(kind is not AttentionKind.SLIDING for kind in kinds[layers:]):
                fields.bad(f"compress_ratios: entries past layer {layers - 1} (mtp) must be 0: {ratios[layers:]}")
    types = fields.left.pop("layer_types", None)
    if types is not None:
        kinds = fields.entries("layer_types", types, {kind.value: kind for kind in AttentionKind}, exactly=layers)
        if kinds is not None:
            spelled["layer_types"] = kinds
    if ratios is None and types is None:
        fields.bad("layer schedule: expected compress_ratios or layer_types, found neither")
    schedule = _agreed_layers(fields, spelled, ())
    if ratios is not None and (rates[AttentionKind.CSA], rates[AttentionKind.HCA]) != (4, 128):
        fields.bad(
            "compress_rates and compress_ratios contradict each other: compress_ratios says 4 and 128, "
            f"compress_rates says {rates[AttentionKind.CSA]} and {rates[AttentionKind.HCA]}"
        )
    return schedule, stages


def _hash_routed(fields: Fields, layers: int) -> tuple[bool, ...]:
    spelled: dict[str, tuple[str, ...]] = {}
    absent = fields.left.get("num_hash_layers") is None
    count = fields.count("num_hash_layers", -1)
    if count >= 0:
        spelled["num_hash_layers"] = tuple(_HASH if layer < count else _LEARNED for layer in range(layers))
    types = fields.left.pop("mlp_layer_types", None)
    if types is not None:
        kinds = fields.entries("mlp_layer_types", types, {word: word for word in (_HASH, _LEARNED)}, exactly=layers)
        if kinds is not None:
            spelled["mlp_layer_types"] = kinds
    if absent and types is None:
        fields.bad("routing: expected num_hash_layers or mlp_layer_types, found neither")
    return tuple(word == _HASH for word in _agreed_layers(fields, spelled, (_LEARNED,) * layers))
