"""Taking the fields out of a published ``config.json``, with every problem in it collected."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TypeVar

from dsv4_convert.errors import BadInput, listed
from dsv4_convert.show.units import number_of
from dsv4_convert.spec.config import MAX_SIZE, DSpark, Yarn, short

_V = TypeVar("_V")

#: Largest JSON number accepted: an integer in JSON has no limit.
_MAX_REAL = sys.float_info.max

#: Fields with exactly one supported value in every architecture; absent means that value.
FIXED: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "scoring_func": "sqrtsoftplus",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}

#: Fields that do not touch the mathematics of a forward pass, by name.
IGNORED = frozenset(
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

#: Integer fields that must be present and positive, under the name that they also have in a config.
SIZES = (
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

#: Real fields that must be present and positive.
REALS = ("hc_eps", "rms_norm_eps", "routed_scaling_factor", "swiglu_limit", "rope_theta", "compress_rope_theta")


class Fields:
    """The fields of one JSON object, taken one by one; what is left over at the end is unknown.

    An object within another one shares the list of problems, which name its fields by their whole path.
    """

    def __init__(self, raw: Mapping[str, Any], where: str, *, within: tuple[Fields, str] | None = None) -> None:
        """``within`` is the object that has this one, and the name of this one in it."""
        self.left = dict(raw)
        self.where = where
        parent, self._prefix = (None, "") if within is None else (within[0], f"{within[1]}.")
        self.problems: list[str] = [] if parent is None else parent.problems

    def inner(self, name: str) -> Fields:
        """The object ``name`` of this one; an empty one, and a problem, where it is none."""
        given = self.left.pop(name, None)
        if not isinstance(given, Mapping):
            self.bad(f"{name}: expected an object, found {short(given) if given is not None else 'nothing'}")
            given = {}
        return Fields(given, self.where, within=(self, name))

    def bad(self, problem: str) -> None:
        """Report a problem of a field of this object."""
        self.problems.append(f"{self._prefix}{problem}")

    def finish(self) -> None:
        """Report every field that nobody took and that could matter."""
        for name in IGNORED:
            self.left.pop(name, None)
        for name, value in self.left.items():
            self.bad(f"{name}: unknown field (value {short(value)}); it may change the mathematics")

    def refuse(self, title: str) -> None:
        """Raise :class:`BadInput` with all problems, if there are any."""
        if self.problems:
            raise BadInput(
                f"{self.where}: not a {title} architecture that dsv4 knows, "
                f"{number_of(len(self.problems), 'problem')}:\n{listed(self.problems)}"
            )

    def agreed(self, said: Mapping[str, _V], default: _V) -> _V:
        """The value that all names of one fact give; where they differ, a problem that shows each."""
        if len(set(said.values())) > 1:
            each = ", ".join(f"{name} says {value}" for name, value in said.items())
            self.bad(f"{' and '.join(said)} contradict each other: {each}")
        return next(iter(said.values()), default)

    def fixed(self, wanted: Mapping[str, Any]) -> None:
        """Take fields that have one supported value each."""
        for name, value in wanted.items():
            found = self.left.pop(name, value)
            if found != value or isinstance(found, bool) != isinstance(value, bool):
                self.bad(f"{name}: only {value!r} is supported, found {found!r}")

    def size(self, name: str) -> int:
        """A positive integer."""
        value = self.left.pop(name, None)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < MAX_SIZE:
            self.bad(
                f"{name}: expected a positive integer below 2**31, "
                f"found {short(value) if value is not None else 'nothing'}"
            )
            return 1
        return value

    def real(self, name: str) -> float:
        """A positive number."""
        value = self.left.pop(name, None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_REAL:
            self.bad(f"{name}: expected a positive number, found {short(value) if value is not None else 'nothing'}")
            return 1.0
        return float(value)

    def count(self, name: str, default: int = 0) -> int:
        """An integer from 0 on; ``default`` where the field is absent or no such number."""
        value = self.left.pop(name, None)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.bad(f"{name}: expected a count, found {short(value)}")
            return default
        return value

    def numbers(self, name: str) -> tuple[int, ...]:
        """A list of integers from 0 on; an absent one is empty."""
        value = self.left.pop(name, None)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(each) is int and 0 <= each < MAX_SIZE for each in value):
            self.bad(f"{name}: expected a list of integers from 0 on, found {short(value)}")
            return ()
        return tuple(value)

    def entries(
        self, name: str, given: Any, table: Mapping[Any, _V], *, exactly: int = 0, at_least: int = 0
    ) -> tuple[_V, ...] | None:
        """A list with one entry per layer, as ``table`` translates them; None, and a problem, for anything else."""
        if not isinstance(given, list):
            self.bad(f"{name}: expected a list, found {short(given)}")
            return None
        if (exactly and len(given) != exactly) or len(given) < at_least:
            self.bad(f"{name}: expected {exactly or at_least} entries (num_hidden_layers), found {len(given)}")
            return None
        wrong = sorted(
            {short(v) for v in given if isinstance(v, bool) or not isinstance(v, int | str) or v not in table}
        )
        if wrong:
            self.bad(f"{name}: expected entries out of {list(table)}, found {', '.join(wrong)}")
            return None
        return tuple(table[value] for value in given)

    def rope(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """``qk_rope_head_dim`` and ``yarn``, in any of their spellings; ``values`` are the sizes and reals."""
        dims: dict[str, int] = {}
        if "qk_rope_head_dim" in self.left:
            dims["qk_rope_head_dim"] = self.size("qk_rope_head_dim")
        self._take_width("partial_rotary_factor", self.left, values, dims)
        tables: dict[str, Yarn | None] = {}
        for name in ("rope_scaling", "rope_parameters"):
            given = self.left.pop(name, None)
            if given is None:
                continue
            thetas: tuple[str, ...] = ("rope_theta", "compress_rope_theta")  # transformers adds the first one
            if isinstance(given, Mapping) and {"main", "compress"} <= set(given):
                for key in set(given) - {"main", "compress"}:
                    self.bad(f"{name}.{key}: unknown field")
                if self._table(f"{name}.main", given["main"], values, dims, thetas=("rope_theta",)) is not None:
                    self.bad(f"{name}.main: the table of window-only layers must not be scaled (type default)")
                name, given, thetas = f"{name}.compress", given["compress"], ("compress_rope_theta",)
            tables[name] = self._table(name, given, values, dims, thetas=thetas)
        if not dims:
            self.bad("qk_rope_head_dim: expected a positive integer, found nothing")
        return {"qk_rope_head_dim": self.agreed(dims, 2), "yarn": self.agreed(tables, None)}

    def _take_width(self, name: str, left: dict[str, Any], values: Mapping[str, Any], dims: dict[str, int]) -> None:
        """A rotary width that is said as a fraction of a head."""
        factor = left.pop("partial_rotary_factor", None)
        if factor is None:
            return
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
            self.bad(f"{name}: expected a fraction of head_dim, found {short(factor)}")
        else:
            dims[name] = round(values["head_dim"] * factor)

    def _table(
        self, name: str, given: Any, values: Mapping[str, Any], dims: dict[str, int], *, thetas: tuple[str, ...]
    ) -> Yarn | None:
        """The scaling of one rotary table. Its ``rope_theta``, if any, repeats one of the fields ``thetas``."""
        if not isinstance(given, Mapping):
            self.bad(f"{name}: expected an object, found {short(given)}")
            return None
        left = dict(given)
        self._take_width(f"{name}.partial_rotary_factor", left, values, dims)
        theta = left.pop("rope_theta", None)
        if theta is not None and (isinstance(theta, bool) or theta not in [values[each] for each in thetas]):
            each = " and ".join(f"{field} says {values[field]}" for field in thetas)
            self.bad(f"{name}.rope_theta: found {short(theta)}, but {each}")
        kinds = {key: left.pop(key) for key in ("type", "rope_type") if isinstance(left.get(key), str)}
        kind = self.agreed({f"{name}.{key}": kind for key, kind in kinds.items()}, "default")
        if kind == "default":
            for key in left:
                self.bad(f"{name}.{key}: unknown field of an unscaled rotary table")
            return None
        if kind != "yarn":
            self.bad(f"{name}: expected type 'yarn' or 'default', found {short(kind)}")
            return None
        if left.pop("attention_factor", 1.0) != 1.0:
            self.bad(f"{name}.attention_factor: the model applies none, only 1.0 is supported")
        numbers: dict[str, float] = {}
        for key in ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings"):
            value = left.pop(key, None)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_REAL:
                self.bad(f"{name}.{key}: expected a positive number, found {short(value)}")
                value = 1
            if key == "original_max_position_embeddings" and not (value == int(value) < MAX_SIZE):
                self.bad(f"{name}.{key}: expected a number of tokens, found {short(value)}")
                value = 1
            numbers[key] = value
        for key in left:
            self.bad(f"{name}.{key}: unknown field")
        return Yarn(
            factor=float(numbers["factor"]),
            beta_fast=float(numbers["beta_fast"]),
            beta_slow=float(numbers["beta_slow"]),
            original_max_position_embeddings=int(numbers["original_max_position_embeddings"]),
        )

    def dspark(self, vocabulary: int, layers: int) -> DSpark | None:
        """The draft, all of whose fields are there or none."""
        if not any(name.startswith("dspark_") for name in self.left):
            return None
        noise, targets = (self.left.pop(name, None) for name in ("dspark_noise_token_id", "dspark_target_layer_ids"))
        if type(noise) is not int or not 0 <= noise < vocabulary:
            self.bad(f"dspark_noise_token_id: expected an id of the vocabulary, found {short(noise)}")
        good = isinstance(targets, list) and all(type(layer) is int and 0 <= layer < layers for layer in targets)
        if not targets or not good or targets != sorted(set(targets)):
            self.bad(f"dspark_target_layer_ids: expected ascending backbone layers, found {short(targets)}")
            targets = []
        return DSpark(
            block_size=self.size("dspark_block_size"),
            noise_token_id=noise or 0,
            target_layer_ids=tuple(targets),
            markov_rank=self.size("dspark_markov_rank"),
        )

    def quantization(self, block: tuple[int, int]) -> dict[str, Any]:
        """``expert_dtype`` and ``weight_block_size``, which has to be ``block`` where weights are quantised."""
        spelled = {"expert_dtype": self.left.pop("expert_dtype", None)}
        quant = self.left.pop("quantization_config", None)
        if isinstance(quant, Mapping):
            left = dict(quant)
            spelled["quantization_config.expert_dtype"] = left.pop("expert_dtype", None)
            wanted = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "ue8m0"}
            for key, value in wanted.items():
                found = left.pop(key, value)
                if found != value:
                    self.bad(f"quantization_config.{key}: only {value!r} is supported, found {found!r}")
            size = left.pop("weight_block_size", None)
            if size != list(block):
                only = f"only {list(block)} is supported"
                self.bad(f"quantization_config.weight_block_size: {only}, found {short(size)}")
            # transformers adds these keys when it saves a loaded model: they say how to load, not what is stored.
            for key in ("dequantize", "modules_to_convert", "modules_to_not_convert"):
                left.pop(key, None)
            for key in left:
                self.bad(f"quantization_config.{key}: unknown field (value {short(left[key])})")
        elif quant is not None:
            self.bad(f"quantization_config: expected an object, found {short(quant)}")
        named: dict[str, str | None] = {}
        for name, value in spelled.items():
            if value in ("fp4", "fp8"):
                named[name] = value
            elif value is not None:
                self.bad(f"{name}: expected 'fp4' or 'fp8', found {short(value)}")
        return {
            "expert_dtype": self.agreed(named, None),
            "weight_block_size": block if isinstance(quant, Mapping) else None,
        }

    def relations(self, values: Mapping[str, Any]) -> None:
        """Report relations between sizes that do not hold; only worth asking when every field could be read."""
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
                self.bad(problem)
