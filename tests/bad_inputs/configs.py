"""A config.json that is not whole, not known, or not that of the tensors beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .case import READERS, Case, Place, accepted, refused
from .checks import backbone_equals_healthy
from .edit import in_config, in_tensors

_CONFIGS = Path(__file__).parents[1] / "data" / "configs"


def _set(**changes: Any) -> Callable[[Place], None]:
    return in_config(lambda config: config.update(changes))


def _without(name: str) -> Callable[[Place], None]:
    return in_config(lambda config: config.pop(name))


def _quantised(**changes: Any) -> Callable[[Place], None]:
    return in_config(lambda config: config["quantization_config"].update(changes))


def _published(name: str) -> Callable[[Place], object]:
    return lambda place: place.config.write_bytes((_CONFIGS / name).read_bytes())


def _no_stage(place: Place) -> None:
    in_tensors(lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("mtp.")])(place)
    (place.source / "model-00005-of-00005.safetensors").unlink()


CONFIGS: tuple[Case, ...] = (
    refused(
        "C01",
        "a field is missing",
        "{config}",
        "hc_mult: expected a positive integer below 2**31, found nothing",
        edit=_without("hc_mult"),
        by=READERS,
    ),
    refused(
        "C01",
        "three fields are missing, all of which are named",
        "{config}",
        "head_dim",
        "hc_eps",
        "vocab_size",
        edit=lambda place: [_without(name)(place) for name in ("head_dim", "hc_eps", "vocab_size")],
    ),
    refused(
        "C01",
        "no config.json",
        "{source}: no config.json",
        "copy it from where the weights came from",
        edit=lambda place: place.config.unlink(),
        by=READERS,
    ),
    refused(
        "C02",
        "a field that nobody knows",
        "{config}",
        "router_temperature: unknown field",
        edit=_set(router_temperature=0.5),
        by=READERS,
    ),
    refused(
        "C03", "another model", "{config}", "model_type", "deepseek_v3", edit=_set(model_type="deepseek_v3"), by=READERS
    ),
    refused(
        "C03",
        "the config of V4.1 beside tensors of V4",
        "{source}",
        "hc_head_fn: unknown tensor",
        "Compare with the repository's file list",
        edit=_published("DeepSeek-V4.1-Flash.from_third_party_test.json"),
    ),
    refused(
        "C04",
        "fewer layers than there are",
        "{source}",
        "layers.1.attn.wq_a.weight: the config has only 1 layers",
        "Compare with the repository's file list",
        edit=_set(num_hidden_layers=1, compress_ratios=[4, 0]),
    ),
    refused(
        "C04",
        "more layers than there are",
        "{source}",
        "layers.2.attn.wq_a.weight: missing (fills layers.2.attn.wq_a)",
        edit=_set(num_hidden_layers=3, compress_ratios=[4, 0, 0, 0]),
    ),
    refused(
        "C04",
        "fewer experts than there are",
        "{source}",
        "layers.0.ffn.experts.2.w1.weight: the config has only 2 experts",
        edit=_set(n_routed_experts=2),
    ),
    refused(
        "C04",
        "another hidden size",
        "{source}",
        "embed.weight: expected shape [32, 64], found BF16 [32, 32]",
        edit=_set(hidden_size=64),
    ),
    refused(
        "C05",
        "fewer compression ratios than layers",
        "{config}",
        "compress_ratios: expected 2 entries (num_hidden_layers), found 1",
        edit=_set(compress_ratios=[4]),
    ),
    refused(
        "C05",
        "a ratio that no layer has",
        "{config}",
        "compress_ratios: expected entries out of [0, 4, 128], found 16",
        edit=_set(compress_ratios=[16, 0, 0]),
    ),
    refused(
        "C06",
        "quantised tensors and no quantization_config",
        "{source}",
        "layers.0.attn.wq_a.weight: quantised, but config.json has no quantization_config",
        edit=_without("quantization_config"),
    ),
    refused(
        "C06",
        "another block size",
        "{config}",
        "quantization_config.weight_block_size: only [128, 128] is supported, found [32, 32]",
        edit=_quantised(weight_block_size=[32, 32]),
        by=READERS,
    ),
    refused(
        "C06",
        "another FP8 format",
        "{config}",
        "quantization_config.fmt: only 'e4m3' is supported, found 'e5m2'",
        edit=_quantised(fmt="e5m2"),
    ),
    refused(
        "C06",
        "experts declared in another form",
        "layers.0.ffn.experts.0.w1.weight: config.json declares fp8 experts, found I8 [32, 16]",
        edit=_set(expert_dtype="fp8"),
    ),
    refused(
        "C07",
        "NaN as a number",
        "{config}: NaN is not a JSON number; replace it by a finite one",
        edit=_set(rms_norm_eps=float("nan")),
        by=READERS,
    ),
    refused(
        "C07", "Infinity as a number", "{config}: Infinity is not a JSON number", edit=_set(rope_theta=float("inf"))
    ),
    refused(
        "C07",
        "a number that overflows to infinity",
        "{config}",
        "the number '1e999' is beyond float64",
        edit=lambda place: place.config.write_text(
            place.config.read_text().replace('"rope_theta": 10000', '"rope_theta": 1e999')
        ),
    ),
    refused(
        "C08",
        "the config of V4-Pro",
        "{source}",
        "embed.weight: expected shape [129280, 7168], found BF16 [32, 32]",
        "problems between its tensors (published names) and its config.json",
        edit=_published("DeepSeek-V4-Pro.json"),
    ),
    accepted(
        "C09",
        "a stage after the backbone is declared, and no tensor of it is there",
        edit=_no_stage,
        after=backbone_equals_healthy,
    ),
    refused(
        "C09",
        "one tensor of a declared stage is missing",
        "mtp.0.e_proj.weight: missing (fills mtp.0.e_proj)",
        edit=in_tensors(lambda tensors: tensors.pop("mtp.0.e_proj.weight")),
    ),
    refused(
        "C09",
        "tensors of a stage that is not declared",
        "mtp.0.e_proj.weight: the config has no mtp stages",
        edit=_set(num_nextn_predict_layers=0, compress_ratios=[4, 0]),
    ),
)
