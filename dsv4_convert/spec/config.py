"""The architecture of one DeepSeek-V4 model, read from a ``config.json``.

:meth:`Config.from_hf` understands the published files and what transformers writes, in both spellings of the layer
schedule (``compress_ratios`` or ``layer_types``), of hash routing (``num_hash_layers`` or ``mlp_layer_types``) and of
the rotary tables (``rope_scaling`` or ``rope_parameters``). It refuses what it does not know: a field that could change
the mathematics is never skipped, and all problems are reported at once.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from dsv4_convert.errors import BadInput, listed
from dsv4_convert.files.strict_json import enumerated, parse_object
from dsv4_convert.folders import CONFIG_FILE, PathLike
from dsv4_convert.show.units import number_of

_V = TypeVar("_V")


class AttentionKind(StrEnum):
    """The entries that a layer attends to besides its sliding window (paper section 2.3)."""

    SLIDING = "sliding_attention"
    CSA = "compressed_sparse_attention"
    HCA = "heavily_compressed_attention"


#: ``compress_ratios`` of the published files -> kind of attention.
_KIND_OF_RATIO = {0: AttentionKind.SLIDING, 4: AttentionKind.CSA, 128: AttentionKind.HCA}

_HASH, _LEARNED = "hash_moe", "moe"

#: Fields with exactly one supported value; absent means that value.
_FIXED: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "is_encoder_decoder": False,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "scoring_func": "sqrtsoftplus",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}

#: Fields that do not touch the mathematics of a forward pass over the backbone, by name.
_IGNORED = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

#: Integer fields that must be present and positive, under the name that they also have here.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "n_routed_experts",
    "num_experts_per_tok",
    "sliding_window",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "hc_mult",
    "hc_sinkhorn_iters",
    "max_position_embeddings",
)

#: Sizes are below this; the largest of V4-Pro is its context, a million.
_MAX_SIZE = 1 << 31
#: Largest JSON number accepted: an integer in JSON has no limit.
_MAX_REAL = sys.float_info.max

#: Real fields that must be present and positive.
_REALS = ("hc_eps", "rms_norm_eps", "routed_scaling_factor", "swiglu_limit", "rope_theta", "compress_rope_theta")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN context extension of the compressed layers' rotary table. No attention factor: the model applies none."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSpark:
    """The draft of the dated releases: all stages together draft a block of tokens, from the streams of some layers.

    Field names are those of the published ``config.json`` without ``dspark_``.
    """

    block_size: int
    #: The token that stands for every token of the block but the first, which is known.
    noise_token_id: int
    #: Backbone layers whose outgoing streams the draft reads.
    target_layer_ids: tuple[int, ...]
    markov_rank: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Every architecture number of one model. Field names are those of the published ``config.json``.

    Per-layer facts are tuples of length ``num_hidden_layers``: ``attention`` and ``hash_routed``. The stages after the
    backbone (``mtp.N``) are counted: they are window-only, score-routed blocks in every release. They predict the token
    after the next (multi-token prediction), or draft blocks of tokens where ``dspark`` is there. A stage has the layer
    number ``num_hidden_layers + stage``, as in the published ``compress_ratios``; :meth:`kind` and :meth:`hashed`
    accept these numbers too.

    Examples:
        >>> config = Config.from_file(Path("checkpoint/config.json"))
        >>> config.num_hidden_layers
        4
    """

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
    attention: tuple[AttentionKind, ...]
    hash_routed: tuple[bool, ...]
    csa_ratio: int = 4
    hca_ratio: int = 128
    num_mtp_stages: int = 0
    dspark: DSpark | None = None
    #: Declared storage of the routed experts ("fp4", "fp8"), None where the file does not say (the first V4-Flash
    #: revision): then the tensors themselves tell.
    expert_dtype: str | None = None
    #: Tile of an FP8 weight that shares one scale, None for an unquantised checkpoint.
    weight_block_size: tuple[int, int] | None = None

    def ratio(self, kind: AttentionKind) -> int:
        """Tokens per compressed entry of a layer of this kind; 0 without a compressor."""
        return {AttentionKind.SLIDING: 0, AttentionKind.CSA: self.csa_ratio, AttentionKind.HCA: self.hca_ratio}[kind]

    def kind(self, layer: int) -> AttentionKind:
        """Attention kind of a layer, or of a stage after the backbone."""
        return self.attention[layer] if layer < self.num_hidden_layers else AttentionKind.SLIDING

    def hashed(self, layer: int) -> bool:
        """Whether a layer, or a stage after the backbone, chooses experts by the token's id."""
        return layer < self.num_hidden_layers and self.hash_routed[layer]

    def of_layers(self, layers: Sequence[int]) -> Config:
        """The architecture with some of its layers only, in this order, and without stages after the backbone."""
        return dataclasses.replace(
            self,
            num_hidden_layers=len(layers),
            num_mtp_stages=0,
            dspark=None,
            attention=tuple(self.attention[layer] for layer in layers),
            hash_routed=tuple(self.hash_routed[layer] for layer in layers),
        )

    def without_stages(self) -> Config:
        """The backbone alone."""
        return dataclasses.replace(self, num_mtp_stages=0, dspark=None)

    @property
    def stage_layers(self) -> range:
        """The layer numbers of the stages after the backbone."""
        return range(self.num_hidden_layers, self.num_hidden_layers + self.num_mtp_stages)

    @property
    def draft_tokens(self) -> int:
        """How many tokens the stages draft at a time: one, or a block of DSpark's."""
        return 1 if self.dspark is None else self.dspark.block_size

    @property
    def draft_sources(self) -> tuple[int, ...]:
        """The backbone layers whose outgoing streams the stages read: the last one, or DSpark's targets."""
        return (self.num_hidden_layers - 1,) if self.dspark is None else self.dspark.target_layer_ids

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
        return cls.from_hf(parse_object(text, where=str(path)), where=str(path))

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], *, where: str = "config.json") -> Config:
        """Build from the parsed JSON of a published ``config.json`` or of one that transformers wrote.

        Raises:
            BadInput: unknown, missing, unsupported or contradicting fields, all of them in one message.
        """
        return _Reader(raw, where).config()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; :meth:`from_json` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: object) -> Config:
        """Rebuild what :meth:`to_json` wrote.

        Raises:
            BadInput: anything else.
        """
        if not isinstance(data, Mapping):
            raise BadInput(f"stored dsv4 config: expected an object, found {_short(data)}; the file is damaged")
        data = {"dspark": None, **data}  # conversions and goldens of dsv4 0.1 lack it
        if differing := sorted({*data} ^ {field.name for field in dataclasses.fields(cls)}):
            raise BadInput(f"stored dsv4 config: missing or unknown fields: {differing}; the file is damaged")
        try:
            attention, yarn, block = data["attention"], data["yarn"], data["weight_block_size"]
            dspark = data["dspark"]
            config = cls(
                **{
                    **data,
                    "attention": tuple(enumerated(kind, AttentionKind, field="attention") for kind in attention),
                    "hash_routed": tuple(data["hash_routed"]),
                    "yarn": None if yarn is None else Yarn(**yarn),
                    "dspark": None
                    if dspark is None
                    else DSpark(**{**dspark, "target_layer_ids": tuple(dspark["target_layer_ids"])}),
                    "weight_block_size": None if block is None else tuple(block),
                }
            )
            problems = [
                problem for part in (config, config.yarn, config.dspark) if part for problem in _ill_typed(part)
            ]
        except (TypeError, ValueError) as error:
            problems = [str(error)]
        if problems:
            raise BadInput(f"stored dsv4 config: not one that dsv4 writes; the file is damaged:\n{listed(problems)}")
        return config


def _ill_typed(stored: Config | Yarn | DSpark) -> list[str]:
    """The fields that no config has so."""
    problems = []
    for field in dataclasses.fields(stored):
        value = getattr(stored, field.name)
        match field.type:
            case "int":
                least = field.name not in ("num_mtp_stages", "noise_token_id")
                good = type(value) is int and least <= value < _MAX_SIZE
            case "float":
                good = type(value) is float and 0 < value < math.inf
            case "tuple[AttentionKind, ...]":
                good = isinstance(stored, Config) and len(value) == stored.num_hidden_layers
            case "tuple[bool, ...]":
                same_length = isinstance(stored, Config) and len(value) == stored.num_hidden_layers
                good = same_length and all(type(entry) is bool for entry in value)
            case "Yarn | None" | "DSpark | None":
                good = True
            case "tuple[int, ...]":
                good = bool(value) and all(type(entry) is int and 0 <= entry < _MAX_SIZE for entry in value)
            case "str | None":
                good = value is None or value in ("fp4", "fp8")
            case "tuple[int, int] | None":
                good = value is None or (len(value) == 2 and all(type(size) is int and size > 0 for size in value))
            case _:
                raise AssertionError(f"{field.name}: {field.type}")
        if not good:
            problems.append(f"{field.name}: {_short(value)}")
    return problems


class _Reader:
    """Takes fields out of a raw config one by one; what is left over at the end is unknown."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        if not isinstance(raw, Mapping):
            raise BadInput(f"{where}: expected a JSON object, found {type(raw).__name__}")
        self.left = dict(raw)
        self.where = where
        self.problems: list[str] = []

    def config(self) -> Config:
        self._refuse_other_models()
        for name, wanted in _FIXED.items():
            found = self.left.pop(name, wanted)
            if found != wanted or isinstance(found, bool) != isinstance(wanted, bool):
                self._bad(f"{name}: only {wanted!r} is supported, found {found!r}")
        values: dict[str, Any] = {name: self._size(name) for name in _SIZES}
        values |= {name: self._real(name) for name in _REALS}
        layers = values["num_hidden_layers"]
        rates = self._compress_rates()
        attention, stages = self._schedule(layers, rates)
        layers = len(attention)  # none where the schedule is a problem, so a wild number costs nothing
        values |= self._rope(values)
        values |= {
            "attention": attention,
            "hash_routed": self._hash_routed(layers),
            "csa_ratio": rates[AttentionKind.CSA],
            "hca_ratio": rates[AttentionKind.HCA],
            "num_mtp_stages": stages,
            "dspark": self._dspark(values["vocab_size"], layers),
        }
        values |= self._quantization()
        for name in list(self.left):
            if name in _IGNORED:
                del self.left[name]
        for name, value in self.left.items():
            self._bad(f"{name}: unknown field (value {_short(value)}); it may change the mathematics")
        self._cross_check(values)
        if self.problems:
            raise BadInput(
                f"{self.where}: not a DeepSeek-V4 architecture that dsv4 knows, "
                f"{number_of(len(self.problems), 'problem')}:\n{listed(self.problems)}"
            )
        return Config(**values)

    def _bad(self, problem: str) -> None:
        self.problems.append(problem)

    def _agreed(self, said: Mapping[str, _V], default: _V) -> _V:
        """What all names of one fact say; a problem that shows what each says where they differ."""
        if len(set(said.values())) > 1:
            each = ", ".join(f"{name} says {value}" for name, value in said.items())
            self._bad(f"{' and '.join(said)} contradict each other: {each}")
        return next(iter(said.values()), default)

    def _agreed_layers(self, said: Mapping[str, tuple[_V, ...]], default: tuple[_V, ...]) -> tuple[_V, ...]:
        """The same of facts about every layer; the problem is the first layer where they differ."""
        for layer, values in enumerate(zip(*said.values(), strict=True)):
            if len(set(values)) > 1:
                each = ", ".join(f"{name} says {value}" for name, value in zip(said, values, strict=True))
                self._bad(f"{' and '.join(said)} contradict each other: of layer {layer} {each}")
                break
        return next(iter(said.values()), default)

    def _refuse_other_models(self) -> None:
        if "dim" in self.left and "n_layers" in self.left:
            raise BadInput(
                f"{self.where}: this is the config of DeepSeek's inference code (inference/config.json); "
                "pass the config.json at the top of the repository"
            )
        model_type = self.left.get("model_type")
        if model_type != "deepseek_v4":
            found = "no model_type" if model_type is None else f"model_type {model_type!r}"
            raise BadInput(
                f"{self.where}: expected model_type 'deepseek_v4', found {found}; dsv4 converts DeepSeek-V4 "
                "(Flash, Pro, their Base and dated releases), other architectures are not supported"
            )

    def _size(self, name: str, default: int | None = None) -> int:
        value = self.left.pop(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < _MAX_SIZE:
            self._bad(
                f"{name}: expected a positive integer below 2**31, "
                f"found {_short(value) if value is not None else 'nothing'}"
            )
            return 1
        return value

    def _real(self, name: str) -> float:
        value = self.left.pop(name, None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_REAL:
            self._bad(f"{name}: expected a positive number, found {_short(value) if value is not None else 'nothing'}")
            return 1.0
        return float(value)

    def _compress_rates(self) -> dict[AttentionKind, int]:
        rates = {AttentionKind.CSA: 4, AttentionKind.HCA: 128}
        given = self.left.pop("compress_rates", None)
        if given is None:
            return rates
        if not isinstance(given, Mapping) or set(given) != {kind.value for kind in rates}:
            self._bad(f"compress_rates: expected the keys {[kind.value for kind in rates]}, found {_short(given)}")
            return rates
        for kind in rates:
            value = given[kind.value]
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < _MAX_SIZE:
                self._bad(
                    f"compress_rates.{kind.value}: expected a positive integer below 2**31, found {_short(value)}"
                )
            else:
                rates[kind] = value
        return rates

    def _schedule(self, layers: int, rates: Mapping[AttentionKind, int]) -> tuple[tuple[AttentionKind, ...], int]:
        """Kind of attention per backbone layer, and the number of stages after the backbone."""
        nextn = self.left.pop("num_nextn_predict_layers", 0)
        if isinstance(nextn, bool) or not isinstance(nextn, int) or nextn < 0:
            self._bad(f"num_nextn_predict_layers: expected a count, found {_short(nextn)}")
            nextn = 0
        spelled: dict[str, tuple[AttentionKind, ...]] = {}
        stages = nextn
        ratios = self.left.pop("compress_ratios", None)
        if ratios is not None:
            kinds = self._kinds("compress_ratios", ratios, _KIND_OF_RATIO, at_least=layers)
            # Entries past the backbone belong to the stages after it; the schedule is the one to believe.
            if kinds is not None:
                spelled["compress_ratios"] = kinds[:layers]
                stages = max(nextn, len(kinds) - layers)
                if any(kind is not AttentionKind.SLIDING for kind in kinds[layers:]):
                    self._bad(f"compress_ratios: entries past layer {layers - 1} (mtp) must be 0: {ratios[layers:]}")
        types = self.left.pop("layer_types", None)
        if types is not None:
            kinds = self._kinds("layer_types", types, {kind.value: kind for kind in AttentionKind}, exactly=layers)
            if kinds is not None:
                spelled["layer_types"] = kinds
        if ratios is None and types is None:
            self._bad("layer schedule: expected compress_ratios or layer_types, found neither")
        schedule = self._agreed_layers(spelled, ())
        if ratios is not None and (rates[AttentionKind.CSA], rates[AttentionKind.HCA]) != (4, 128):
            self._bad(
                "compress_rates and compress_ratios contradict each other: compress_ratios says 4 and 128, "
                f"compress_rates says {rates[AttentionKind.CSA]} and {rates[AttentionKind.HCA]}"
            )
        return schedule, stages

    def _dspark(self, vocabulary: int, layers: int) -> DSpark | None:
        """The draft of a dated release, all of whose fields are there or none."""
        if not any(name.startswith("dspark_") for name in self.left):
            return None
        noise, targets = (self.left.pop(name, None) for name in ("dspark_noise_token_id", "dspark_target_layer_ids"))
        if type(noise) is not int or not 0 <= noise < vocabulary:
            self._bad(f"dspark_noise_token_id: expected an id of the vocabulary, found {_short(noise)}")
        good = isinstance(targets, list) and all(type(layer) is int and 0 <= layer < layers for layer in targets)
        if not targets or not good or targets != sorted(set(targets)):
            self._bad(f"dspark_target_layer_ids: expected ascending backbone layers, found {_short(targets)}")
            targets = []
        return DSpark(
            block_size=self._size("dspark_block_size"),
            noise_token_id=noise or 0,
            target_layer_ids=tuple(targets),
            markov_rank=self._size("dspark_markov_rank"),
        )

    def _kinds(
        self, name: str, given: Any, table: Mapping[Any, _V], *, exactly: int = 0, at_least: int = 0
    ) -> tuple[_V, ...] | None:
        if not isinstance(given, list):
            self._bad(f"{name}: expected a list, found {_short(given)}")
            return None
        if (exactly and len(given) != exactly) or len(given) < at_least:
            wanted = exactly or at_least
            self._bad(f"{name}: expected {wanted} entries (num_hidden_layers), found {len(given)}")
            return None
        wrong = sorted(
            {_short(v) for v in given if isinstance(v, bool) or not isinstance(v, int | str) or v not in table}
        )
        if wrong:
            self._bad(f"{name}: expected entries out of {list(table)}, found {', '.join(wrong)}")
            return None
        return tuple(table[value] for value in given)

    def _hash_routed(self, layers: int) -> tuple[bool, ...]:
        spelled: dict[str, tuple[str, ...]] = {}
        count = self.left.pop("num_hash_layers", None)
        if count is not None:
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                self._bad(f"num_hash_layers: expected a count, found {_short(count)}")
            else:
                spelled["num_hash_layers"] = tuple(_HASH if layer < count else _LEARNED for layer in range(layers))
        types = self.left.pop("mlp_layer_types", None)
        if types is not None:
            kinds = self._kinds("mlp_layer_types", types, {word: word for word in (_HASH, _LEARNED)}, exactly=layers)
            if kinds is not None:
                spelled["mlp_layer_types"] = kinds
        if count is None and types is None:
            self._bad("routing: expected num_hash_layers or mlp_layer_types, found neither")
        return tuple(word == _HASH for word in self._agreed_layers(spelled, (_LEARNED,) * layers))

    def _rope(self, values: Mapping[str, Any]) -> dict[str, Any]:
        dims: dict[str, int] = {}
        if "qk_rope_head_dim" in self.left:
            dims["qk_rope_head_dim"] = self._size("qk_rope_head_dim")
        self._take_width("partial_rotary_factor", self.left, values, dims)
        tables: dict[str, Yarn | None] = {}
        for name in ("rope_scaling", "rope_parameters"):
            given = self.left.pop(name, None)
            if given is None:
                continue
            thetas: tuple[str, ...] = ("rope_theta", "compress_rope_theta")  # transformers adds the first one
            if isinstance(given, Mapping) and {"main", "compress"} <= set(given):
                for key in set(given) - {"main", "compress"}:
                    self._bad(f"{name}.{key}: unknown field")
                if self._table(f"{name}.main", given["main"], values, dims, thetas=("rope_theta",)) is not None:
                    self._bad(f"{name}.main: the table of window-only layers must not be scaled (type default)")
                name, given, thetas = f"{name}.compress", given["compress"], ("compress_rope_theta",)
            tables[name] = self._table(name, given, values, dims, thetas=thetas)
        if not dims:
            self._bad("qk_rope_head_dim: expected a positive integer, found nothing")
        return {"qk_rope_head_dim": self._agreed(dims, 2), "yarn": self._agreed(tables, None)}

    def _take_width(self, name: str, left: dict[str, Any], values: Mapping[str, Any], dims: dict[str, int]) -> None:
        """A rotary width that is said as a fraction of a head."""
        factor = left.pop("partial_rotary_factor", None)
        if factor is None:
            return
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
            self._bad(f"{name}: expected a fraction of head_dim, found {_short(factor)}")
        else:
            dims[name] = round(values["head_dim"] * factor)

    def _table(
        self, name: str, given: Any, values: Mapping[str, Any], dims: dict[str, int], *, thetas: tuple[str, ...]
    ) -> Yarn | None:
        """The scaling of one rotary table. Its ``rope_theta``, if any, repeats one of the fields ``thetas``."""
        if not isinstance(given, Mapping):
            self._bad(f"{name}: expected an object, found {_short(given)}")
            return None
        left = dict(given)
        self._take_width(f"{name}.partial_rotary_factor", left, values, dims)
        theta = left.pop("rope_theta", None)
        if theta is not None and (isinstance(theta, bool) or theta not in [values[each] for each in thetas]):
            each = " and ".join(f"{field} says {values[field]}" for field in thetas)
            self._bad(f"{name}.rope_theta: found {_short(theta)}, but {each}")
        kinds = {key: left.pop(key) for key in ("type", "rope_type") if isinstance(left.get(key), str)}
        kind = self._agreed({f"{name}.{key}": kind for key, kind in kinds.items()}, "default")
        if kind == "default":
            for key in left:
                self._bad(f"{name}.{key}: unknown field of an unscaled rotary table")
            return None
        if kind != "yarn":
            self._bad(f"{name}: expected type 'yarn' or 'default', found {_short(kind)}")
            return None
        if left.pop("attention_factor", 1.0) != 1.0:
            self._bad(f"{name}.attention_factor: the model applies none, only 1.0 is supported")
        numbers: dict[str, float] = {}
        for key in ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings"):
            value = left.pop(key, None)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_REAL:
                self._bad(f"{name}.{key}: expected a positive number, found {_short(value)}")
                value = 1
            if key == "original_max_position_embeddings" and not (value == int(value) < _MAX_SIZE):
                self._bad(f"{name}.{key}: expected a number of tokens, found {_short(value)}")
                value = 1
            numbers[key] = value
        for key in left:
            self._bad(f"{name}.{key}: unknown field")
        return Yarn(
            factor=float(numbers["factor"]),
            beta_fast=float(numbers["beta_fast"]),
            beta_slow=float(numbers["beta_slow"]),
            original_max_position_embeddings=int(numbers["original_max_position_embeddings"]),
        )

    def _quantization(self) -> dict[str, Any]:
        spelled = {"expert_dtype": self.left.pop("expert_dtype", None)}
        quant = self.left.pop("quantization_config", None)
        block: tuple[int, int] | None = None
        if isinstance(quant, Mapping):
            left = dict(quant)
            spelled["quantization_config.expert_dtype"] = left.pop("expert_dtype", None)
            wanted = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "ue8m0"}
            for key, value in wanted.items():
                found = left.pop(key, value)
                if found != value:
                    self._bad(f"quantization_config.{key}: only {value!r} is supported, found {found!r}")
            size = left.pop("weight_block_size", None)
            if size != [128, 128]:
                self._bad(f"quantization_config.weight_block_size: only [128, 128] is supported, found {_short(size)}")
            else:
                block = (128, 128)
            # transformers adds these keys when it saves a loaded model: they say how to load, not what is stored.
            for key in ("dequantize", "modules_to_convert", "modules_to_not_convert"):
                left.pop(key, None)
            for key in left:
                self._bad(f"quantization_config.{key}: unknown field (value {_short(left[key])})")
        elif quant is not None:
            self._bad(f"quantization_config: expected an object, found {_short(quant)}")
        named: dict[str, str | None] = {}
        for name, value in spelled.items():
            if value in ("fp4", "fp8"):
                named[name] = value
            elif value is not None:
                self._bad(f"{name}: expected 'fp4' or 'fp8', found {_short(value)}")
        return {"expert_dtype": self._agreed(named, None), "weight_block_size": block}

    def _cross_check(self, values: Mapping[str, Any]) -> None:
        """Relations between fields; only worth asking when every field could be read."""
        if self.problems:
            return
        v = values
        relations = (
            (
                v["qk_rope_head_dim"] > 0 and v["qk_rope_head_dim"] % 2 == 0,
                "qk_rope_head_dim must be even (pairs are rotated)",
            ),
            (v["qk_rope_head_dim"] <= v["head_dim"], "qk_rope_head_dim must not exceed head_dim"),
            (v["qk_rope_head_dim"] <= v["index_head_dim"], "qk_rope_head_dim must not exceed index_head_dim"),
            (v["num_attention_heads"] % v["o_groups"] == 0, "num_attention_heads must be a multiple of o_groups"),
            (v["num_experts_per_tok"] <= v["n_routed_experts"], "num_experts_per_tok must not exceed n_routed_experts"),
        )
        for holds, problem in relations:
            if not holds:
                self._bad(problem)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
