"""Config: every published file, what transformers writes, and everything that has to be refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_convert.errors import BadInput
from dsv4_convert.spec.config import Config, DSpark, Yarn
from dsv4_convert.spec.v4.kinds import AttentionKind

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
FLASH = "DeepSeek-V4-Flash"
PUBLISHED = (FLASH, "DeepSeek-V4-Flash-0731", "DeepSeek-V4-Flash-Base", "DeepSeek-V4-Flash.initial-commit-20260424",
             "DeepSeek-V4-Pro")  # fmt: skip


def _raw(name: str = FLASH) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_reads_every_published_config(name: str) -> None:
    config = Config.from_file(CONFIGS / f"{name}.json")
    assert config.yarn == Yarn(factor=16, beta_fast=32, beta_slow=1, original_max_position_embeddings=65536)
    assert config.hash_routed == (True,) * 3 + (False,) * (config.num_hidden_layers - 3)
    assert config.weight_block_size == (128, 128)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_the_schedule_of_flash_and_pro() -> None:
    flash, pro = Config.from_hf(_raw()), Config.from_hf(_raw("DeepSeek-V4-Pro"))
    assert flash.attention[:4] == (AttentionKind.SLIDING, AttentionKind.SLIDING, AttentionKind.CSA, AttentionKind.HCA)
    assert [flash.attention.count(kind) for kind in AttentionKind] == [2, 21, 20]
    assert pro.attention[:3] == (AttentionKind.HCA, AttentionKind.HCA, AttentionKind.CSA)
    assert [pro.attention.count(kind) for kind in AttentionKind] == [0, 30, 31]
    assert (flash.num_mtp_stages, pro.num_mtp_stages) == (1, 1)
    assert list(flash.stage_layers) == [43]
    assert (flash.kind(43), flash.hashed(43)) == (AttentionKind.SLIDING, False)
    assert flash.dspark is pro.dspark is None
    # The dated releases have DSpark's three stages there; num_nextn_predict_layers says 1.
    dated = Config.from_hf(_raw("DeepSeek-V4-Flash-0731"))
    assert (dated.num_mtp_stages, list(dated.stage_layers)) == (3, [43, 44, 45])
    assert dated.dspark == DSpark(block_size=5, noise_token_id=128799, target_layer_ids=(40, 41, 42), markov_rank=256)
    assert dated.without_stages() == flash.without_stages()


def test_the_declared_storage_of_experts() -> None:
    assert [Config.from_hf(_raw(name)).expert_dtype for name in PUBLISHED] == ["fp4", "fp4", "fp8", None, "fp4"]


def _saved(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """As ``save_pretrained`` writes it."""
    from transformers import DeepseekV4Config

    DeepseekV4Config(**raw).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def _saved_with_a_model(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """As ``save_pretrained`` of a model whose weights are FP8 writes it."""
    from transformers import DeepseekV4Config, FineGrainedFP8Config

    config = DeepseekV4Config(**raw)
    config.quantization_config = FineGrainedFP8Config.from_dict(config.quantization_config)
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def _complete(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Every field, those at their defaults too."""
    from transformers import DeepseekV4Config

    return json.loads(DeepseekV4Config(**raw).to_json_string(use_diff=False))


def _completed_in_place(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What is left of the published fields after transformers has read them: it writes into ``rope_scaling``."""
    from transformers import DeepseekV4Config

    DeepseekV4Config(**raw)
    assert raw["rope_scaling"].keys() > {"rope_theta", "rope_type", "type"}
    return raw


@pytest.mark.parametrize("write", [_saved, _saved_with_a_model, _complete, _completed_in_place])
@pytest.mark.parametrize("name", PUBLISHED)
def test_what_transformers_writes_is_the_same_architecture(
    name: str, write: Callable[[dict[str, Any], Path], dict[str, Any]], tmp_path: Path
) -> None:
    ours, theirs = Config.from_hf(_raw(name)), Config.from_hf(write(_raw(name), tmp_path))
    # transformers drops the schedule's trailing entries, and with them the number of stages. It always says which
    # dtype the experts of FP8 weights have.
    expected = ours.to_json() | {"num_mtp_stages": theirs.num_mtp_stages}
    if write is _saved_with_a_model and ours.expert_dtype is None:
        expected["expert_dtype"] = "fp8"
    assert theirs.to_json() == expected


def test_both_spellings_may_stand_together_if_they_agree() -> None:
    raw = _raw()
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    raw["layer_types"] = [kinds[ratio] for ratio in raw["compress_ratios"][:43]]
    raw["mlp_layer_types"] = ["hash_moe"] * 3 + ["moe"] * 40
    assert Config.from_hf(raw) == Config.from_hf(_raw())
    raw["layer_types"][5], raw["mlp_layer_types"][3] = "sliding_attention", "hash_moe"
    with pytest.raises(BadInput) as caught:
        Config.from_hf(raw)
    assert (
        "compress_ratios and layer_types contradict each other: of layer 5 compress_ratios says "
        "heavily_compressed_attention, layer_types says sliding_attention"
    ) in str(caught.value)
    assert (
        "num_hash_layers and mlp_layer_types contradict each other: of layer 3 num_hash_layers says moe, "
        "mlp_layer_types says hash_moe"
    ) in str(caught.value)


@pytest.mark.parametrize("theta", [10000, 160000.0])
def test_a_rotary_table_may_repeat_what_stands_beside_it(theta: float) -> None:
    raw = _raw()
    raw["rope_scaling"] |= {"rope_theta": theta, "rope_type": "yarn", "partial_rotary_factor": 0.125}
    assert Config.from_hf(raw) == Config.from_hf(_raw())


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (
            {"rope_theta": 500000},
            "rope_scaling.rope_theta: found 500000, but rope_theta says 10000.0 and compress_rope_theta says 160000.0",
        ),
        (
            {"rope_type": "default"},
            "rope_scaling.type and rope_scaling.rope_type contradict each other: rope_scaling.type says yarn, "
            "rope_scaling.rope_type says default",
        ),
        (
            {"partial_rotary_factor": 0.5},
            "qk_rope_head_dim and rope_scaling.partial_rotary_factor contradict each other: qk_rope_head_dim says 64, "
            "rope_scaling.partial_rotary_factor says 256",
        ),
    ],
)
def test_a_contradiction_of_a_rotary_table_shows_both(table: dict[str, Any], complaint: str) -> None:
    raw = _raw()
    raw["rope_scaling"] |= table
    with pytest.raises(BadInput) as caught:
        Config.from_hf(raw)
    assert "1 problem" in str(caught.value)
    assert complaint in str(caught.value)


def test_contradictions_of_what_transformers_writes_show_both(tmp_path: Path) -> None:
    raw = {**_raw(), **_saved(_raw(), tmp_path)}
    assert Config.from_hf(raw) == Config.from_hf(_raw())
    raw["rope_parameters"]["main"]["rope_theta"] = 160000
    raw["rope_parameters"]["compress"] |= {"rope_theta": 10000, "factor": 32}
    raw["compress_rates"]["heavily_compressed_attention"] = 64
    raw["expert_dtype"] = "fp8"
    with pytest.raises(BadInput) as caught:
        Config.from_hf(raw)
    for complaint in (
        "rope_parameters.main.rope_theta: found 160000, but rope_theta says 10000.0",
        "rope_parameters.compress.rope_theta: found 10000, but compress_rope_theta says 160000.0",
        "rope_scaling says Yarn(factor=16.0, ",
        "rope_parameters.compress says Yarn(factor=32.0, ",
        "compress_ratios says 4 and 128, compress_rates says 4 and 64",
        "expert_dtype says fp8, quantization_config.expert_dtype says fp4",
    ):
        assert complaint in str(caught.value)
    assert "5 problems" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"attention_bias": True}, "attention_bias: only False"),
        ({"scoring_func": "softmax"}, "scoring_func: only 'sqrtsoftplus'"),
        ({"num_key_value_heads": 8}, "num_key_value_heads: only 1"),
        ({"hidden_size": "4096"}, "hidden_size: expected a positive integer"),
        ({"hidden_size": True}, "hidden_size: expected a positive integer"),
        ({"hc_mult": 0}, "hc_mult: expected a positive integer"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a positive number"),
        ({"swiglu_limit": None}, "swiglu_limit: expected a positive number, found nothing"),
        ({"compress_ratios": [0, 4]}, "compress_ratios: expected 43 entries"),
        ({"compress_ratios": [2] * 44}, "compress_ratios: expected entries out of [0, 4, 128], found 2"),
        ({"compress_ratios": [0] * 43 + [4]}, "entries past layer 42 (mtp) must be 0"),
        ({"dspark_block_size": 5}, "dspark_noise_token_id: expected an id of the vocabulary, found None"),
        ({"dspark_block_size": 5}, "dspark_target_layer_ids: expected ascending backbone layers, found None"),
        ({"dspark_block_size": 5}, "dspark_markov_rank: expected a positive integer below 2**31, found nothing"),
        ({"dspark_noise_token_id": 129280}, "dspark_noise_token_id: expected an id of the vocabulary, found 129280"),
        ({"dspark_target_layer_ids": [40, 43]}, "expected ascending backbone layers, found [40, 43]"),
        ({"dspark_target_layer_ids": [42, 40]}, "expected ascending backbone layers, found [42, 40]"),
        ({"dspark_target_layer_ids": []}, "expected ascending backbone layers, found []"),
        ({"dspark_depth": 3}, "dspark_depth: unknown field"),
        ({"compress_ratios": None}, "expected compress_ratios or layer_types, found neither"),
        ({"num_hash_layers": None}, "expected num_hash_layers or mlp_layer_types, found neither"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim must be even"),
        ({"qk_rope_head_dim": 256}, "must not exceed index_head_dim"),
        ({"num_attention_heads": 60}, "must be a multiple of o_groups"),
        ({"num_experts_per_tok": 300}, "must not exceed n_routed_experts"),
        ({"partial_rotary_factor": 0.25}, "qk_rope_head_dim says 64, partial_rotary_factor says 128"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "expected type 'yarn' or 'default'"),
        ({"rope_scaling": {"type": "yarn", "factor": 16}}, "rope_scaling.beta_fast: expected a positive number"),
        ({"expert_dtype": "int8"}, "expert_dtype: expected 'fp4' or 'fp8'"),
        ({"quantization_config": {"weight_block_size": [32, 32]}}, "only [128, 128] is supported, found [32, 32]"),
        ({"quantization_config": {"weight_block_size": [128, 128], "fmt": "e5m2"}}, "only 'e4m3' is supported"),
        ({"vision_n_layers": 32}, "vision_dim: expected a positive integer below 2**31, found nothing"),
        ({"vision_depth": 32}, "vision_depth: unknown field"),
        ({"n_group": 8}, "n_group: unknown field"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder: only False"),
    ],
)  # fmt: skip
def test_refuses_and_says_what(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadInput) as caught:
        Config.from_hf(
            {key: value for key, value in {**_raw(), **change}.items() if value is not None}, where="X/config.json"
        )
    assert complaint in str(caught.value)
    assert str(caught.value).startswith("X/config.json")


def test_all_problems_come_at_once() -> None:
    raw = {**_raw(), "hidden_size": -1, "n_group": 8, "tie_word_embeddings": True}
    del raw["q_lora_rank"]
    with pytest.raises(BadInput) as caught:
        Config.from_hf(raw)
    assert "4 problems" in str(caught.value)
    for name in ("hidden_size", "n_group", "tie_word_embeddings", "q_lora_rank"):
        assert f"- {name}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("DeepSeek-V4-Flash.inference_config", "config of DeepSeek's inference code"),
        ("DeepSeek-V4-Pro.inference_config", "config of DeepSeek's inference code"),
    ],
)
def test_other_models_are_refused_by_name(name: str, complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        Config.from_file(CONFIGS / f"{name}.json")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        Config.from_file(tmp_path / "config.json")
    for content in (b"", b"[1]", b"{", b"\xff\xfe"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(BadInput, match=r"config\.json"):
            Config.from_file(tmp_path / "config.json")


@given(
    st.dictionaries(
        st.sampled_from(sorted(_raw())), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers())
    )
)
def test_no_value_makes_it_crash(change: dict[str, Any]) -> None:
    with contextlib.suppress(BadInput):
        Config.from_hf({**_raw(), **change})
