"""MaxText's config of a DeepSeek-V4 model: one table, as flags of its programs and as a model file of its own form.

MaxText 0.2.5 ships configs of V4-Flash (``deepseek4-284b``) and of a tiny model, and admits no other names. With
``override_model_config=True`` flags replace the numbers of a known model, so :func:`flags` describe any model to an
unchanged MaxText. The fields are those of its ``configs/types.py``, and how files and flags are merged is in its
``configs/pyconfig.py``.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable

from dsv4_convert.errors import UsageError, listed
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.v4.config import V4Config
from dsv4_convert.spec.v4.kinds import AttentionKind

Value = bool | int | float | str | list[int] | list[str]

#: The release of MaxText that the table was read from.
VERSION = "0.2.5"

#: Whatever the size of the model: MaxText chooses its code by the first letters, ``deepseek4``.
MODEL_NAME = "deepseek4-284b"

#: A conversion writes this file beside the checkpoint.
FILE = "maxtext.yml"

#: For those who train with an older MaxText.
OLDER = (
    "Training with MaxText up to e591f30cb needs load_full_state_path in place of load_parameters_path, which leaves "
    "the hash tables and the router bias at zero there, without an error."
)

#: A constant of MaxText's ``layers/mhc.py``, which all releases have.
EPS = 1e-6

#: MaxText's field -> its value for a model.
FIELDS: dict[str, Callable[[V4Config], Value]] = {
    "decoder_block": lambda c: "deepseek4",
    "base_emb_dim": lambda c: c.hidden_size,
    "base_num_query_heads": lambda c: c.num_attention_heads,
    "base_num_kv_heads": lambda c: 1,
    "base_num_decoder_layers": lambda c: c.num_hidden_layers,
    "base_mlp_dim": lambda c: c.moe_intermediate_size,
    "base_moe_mlp_dim": lambda c: c.moe_intermediate_size,
    "vocab_size": lambda c: c.vocab_size,
    "head_dim": lambda c: c.head_dim,
    "qk_rope_head_dim": lambda c: c.qk_rope_head_dim,
    "logits_via_embedding": lambda c: False,
    "normalization_layer_epsilon": lambda c: c.rms_norm_eps,
    "mhc_expansion_rate": lambda c: c.hc_mult,
    "sinkhorn_iterations": lambda c: c.hc_sinkhorn_iters,
    "first_num_hash_layers": lambda c: sum(c.hash_routed),
    "use_indexer": lambda c: True,
    "indexer_head_dim": lambda c: c.index_head_dim,
    "indexer_n_heads": lambda c: c.index_n_heads,
    "indexer_topk": lambda c: c.index_topk,
    "compress_ratios": lambda c: [c.ratio(kind) for kind in c.attention],
    "mlp_activations": lambda c: ["silu", "linear"],
    "mlp_activations_limit": lambda c: c.swiglu_limit,
    "num_experts": lambda c: c.n_routed_experts,
    "num_experts_per_tok": lambda c: c.num_experts_per_tok,
    "shared_experts": lambda c: 1,
    "routed_score_func": lambda c: "sqrtsoftplus",
    "norm_topk_prob": lambda c: True,
    "routed_bias": lambda c: True,
    "routed_scaling_factor": lambda c: c.routed_scaling_factor,
    "attention_type": lambda c: "compressed",
    "q_lora_rank": lambda c: c.q_lora_rank,
    "o_groups": lambda c: c.o_groups,
    "o_lora_rank": lambda c: c.o_lora_rank,
    "sliding_window_size": lambda c: c.sliding_window,
    "rope_type": lambda c: "default",
    "rope_max_timescale": lambda c: int(c.rope_theta),
    "compressed_rope_max_timescale": lambda c: int(c.compress_rope_theta),
    "max_position_embeddings": lambda c: c.max_position_embeddings,
    "original_max_position_embeddings": lambda c: (
        c.yarn.original_max_position_embeddings if c.yarn is not None else c.max_position_embeddings
    ),
    # Settings of training, which no config.json has.
    "enable_dropout": lambda c: False,
    "routed_bias_update_rate": lambda c: 0.001,
    "load_balance_loss_weight": lambda c: 0.0001,
}


def flags(config: Config, *, scanned: bool) -> list[str]:
    """Arguments of any MaxText program that describe the model, of a tree with scanned layers or without."""
    settings: dict[str, Value] = {
        "model_name": MODEL_NAME,
        "override_model_config": True,
        "scan_layers": scanned,
        "attention": "dot_product",  # the default, autoselected, is refused for this family
    }
    known = expressible(config)
    fields = settings | {field: value(known) for field, value in FIELDS.items()}
    return [f"{field}={_text(value)}" for field, value in fields.items()]


def command(config: Config, checkpoint: str, *, scanned: bool) -> str:
    """The line for a shell that trains from a converted checkpoint."""
    given = [*flags(config, scanned=scanned), f"load_parameters_path={checkpoint}"]
    return shlex.join(["python3", "-m", "maxtext.trainers.pre_train.train", *given])


def model_file(config: Config, *, scanned: bool) -> bytes:
    """The same fields as a YAML file in the form of MaxText's ``configs/models``, below the flags as a comment."""
    known = expressible(config)
    lines = [
        f"# This model for MaxText {VERSION}, by dsv4.",
        "# As flags of any of its programs, to which load_parameters_path= and the path of this folder are added:",
        f"# {shlex.join(flags(config, scanned=scanned))}",
        f"# As a file: models/{MODEL_NAME}.yml beside the config file of a run that has model_name={MODEL_NAME},",
        f"# scan_layers={scanned} and attention=dot_product.",
        f"# {OLDER}",
        *(f"{field}: {_text(value(known))}" for field, value in FIELDS.items()),
    ]
    return "\n".join([*lines, ""]).encode()


def expressible(config: Config) -> V4Config:
    """The config of an architecture that MaxText has. Raises :class:`UsageError` for another one."""
    if not isinstance(config, V4Config):
        raise UsageError(f"MaxText {VERSION} has no {config.title}; use --layout dsv4")
    return config


def check(config: Config, *, scanned: bool) -> None:
    """Refuse what MaxText has no field for.

    Raises:
        UsageError: every such property of the model.
    """
    config = expressible(config)
    hashed, kinds = sum(config.hash_routed), set(config.attention)
    problems = []
    if not all(config.hash_routed[:hashed]):
        problems.append("first_num_hash_layers: the hash-routed layers are not the first ones")
    if AttentionKind.CSA in kinds and config.csa_ratio != 4:
        problems.append(f"compress_ratios: a CSA layer has the ratio 4, this model's have {config.csa_ratio}")
    if AttentionKind.HCA in kinds and config.hca_ratio <= 4:
        problems.append(f"compress_ratios: an HCA layer has a ratio above 4, this model's have {config.hca_ratio}")
    if config.vision is not None:
        problems.append("vision_n_layers: there is no DeepSeek-V4 with a vision encoder")
    if not (config.rope_theta.is_integer() and config.compress_rope_theta.is_integer()):
        bases = f"{config.rope_theta} and {config.compress_rope_theta}"
        problems.append(f"rope_max_timescale and compressed_rope_max_timescale: integers, this model's are {bases}")
    if problems:
        raise UsageError(f"MaxText {VERSION} cannot express this model; use --layout dsv4:\n{listed(problems)}")
    rest = config.attention[hashed:]
    alternating = all(kind is (AttentionKind.CSA if at % 2 else AttentionKind.HCA) for at, kind in enumerate(rest))
    if scanned and (not rest or len(rest) % 2 or not alternating or config.hca_ratio != 128):
        raise UsageError(
            "MaxText scans pairs of an HCA layer (ratio 128) and a CSA layer behind the hash-routed ones; this model's "
            "layers do not alternate like that. Use --layout maxtext-unscanned and scan_layers=False."
        )


def differences(config: Config) -> list[str]:
    """Computations of this model in which MaxText departs from the release."""
    found, known = [], expressible(config)
    if known.yarn is not None and set(known.attention) != {AttentionKind.SLIDING}:
        found.append("no YaRN on layers with a compressor (DeepSeekV4RotaryEmbedding)")
    found.append(f"no clamp of the shared expert at {config.swiglu_limit:g} (MlpBlock)")
    if {config.hc_eps, config.rms_norm_eps} != {EPS}:
        found.append(f"{EPS:g} for hc_eps, and for rms_norm_eps in the head (layers/mhc.py)")
    return found


def warning(config: Config) -> str:
    """:func:`differences` in a sentence."""
    return f"MaxText {VERSION} computes other logits from these weights: {'; '.join(differences(config))}"


def _text(value: Value) -> str:
    """A value as both YAML and MaxText's command line read it."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    if isinstance(value, float):
        digits, exponent, power = repr(value).partition("e")
        return f"{digits if '.' in digits else f'{digits}.0'}{exponent}{power}"  # YAML 1.1 takes 1e-06 for a string
    return str(value)
