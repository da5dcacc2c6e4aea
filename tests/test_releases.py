"""Every release converts and checks by its config alone; what is not supported is refused in one message."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dsv4_convert.checkpoint import Checkpoint, TensorEntry, TensorInfo, write_index, write_safetensors
from dsv4_convert.checkpoint.header import stored_nbytes
from dsv4_convert.convert import Storage, plan
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.spec.config import Config

from .cli.test_commands import GOLDEN, dsv4

DATA = Path(__file__).parent / "data"
#: Inventory and config.
RELEASES = (
    ("DeepSeek-V4-Flash", "DeepSeek-V4-Flash"),
    ("DeepSeek-V4-Flash", "DeepSeek-V4-Flash.initial-commit-20260424"),
    ("DeepSeek-V4-Flash-Base", "DeepSeek-V4-Flash-Base"),
    ("DeepSeek-V4-Flash-0731", "DeepSeek-V4-Flash-0731"),
    ("DeepSeek-V4-Pro", "DeepSeek-V4-Pro"),
    ("DeepSeek-V4-Pro-0813", "DeepSeek-V4-Pro-0813.from_public_notes"),
    ("DeepSeek-V4.1-Flash", "DeepSeek-V4.1-Flash.from_third_party_test"),
)


def _raw(config: str) -> dict[str, Any]:
    return json.loads((DATA / "configs" / f"{config}.json").read_text())


@dataclass(frozen=True)
class Headers:
    """A release as its headers describe it."""

    tensors: Mapping[str, TensorInfo]
    root: Path = Path("release")
    absent: frozenset[str] = field(default_factory=frozenset)


def headers_of(inventory: str) -> tuple[Headers, dict[str, Any]]:
    document = json.loads((DATA / "inventory" / f"{inventory}.json").read_text())
    infos = {}
    for template, (dtype, shape) in document["tensors"].items():
        nbytes = stored_nbytes(dtype, tuple(shape))
        for expert in range(document["n_experts"] if "{e}" in template else 1):
            name = template.replace("{e}", str(expert))
            infos[name] = TensorInfo(
                name=name, dtype=dtype, shape=tuple(shape), file=Path("release/one.safetensors"), start=0, end=nbytes
            )
    return Headers(infos), document["summary"]


@pytest.mark.parametrize(("inventory", "config"), RELEASES, ids=[f"{i}, {c}" for i, c in RELEASES])
def test_a_release_is_planned_by_its_config_alone(inventory: str, config: str) -> None:
    """Every byte that its repository states is read, and nothing is left out."""
    release, summary = headers_of(inventory)
    planned = plan(release, Config.from_hf(_raw(config)), Storage.SOURCE)
    assert not planned.dropped
    assert (planned.tensors, planned.bytes_read) == (summary["tensors"], summary["bytes"])
    assert planned.bytes_written == planned.bytes_read
    assert planned.config.num_mtp_stages == (3 if inventory.endswith(("0731", "0813", "V4.1-Flash")) else 1)


def _shrunk(config: str) -> dict[str, Any]:
    """A published config with its first layers and small widths; every other field as it is."""
    raw = _raw(config)
    small = {
        "vocab_size": 96, "hidden_size": 160, "moe_intermediate_size": 160, "num_hidden_layers": 5,
        "num_attention_heads": 4, "head_dim": 32, "qk_rope_head_dim": 8, "q_lora_rank": 48, "o_groups": 2,
        "o_lora_rank": 16, "n_routed_experts": 8, "index_n_heads": 8, "index_head_dim": 16, "index_topk": 5,
        "sliding_window": 16,
    }  # fmt: skip
    layers = raw["num_hidden_layers"]
    small["compress_ratios"] = [*raw["compress_ratios"][:5], *raw["compress_ratios"][layers:]]
    if "dspark_block_size" in raw:
        small |= {"dspark_noise_token_id": 95, "dspark_target_layer_ids": [2, 3, 4], "dspark_markov_rank": 16}
    assert small.keys() <= raw.keys()
    return {**raw, **small}


def _add(folder: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """One more shard, of zeros."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    entries = [
        TensorEntry(name, dtype, shape, lambda dtype=dtype, shape=shape: bytes(stored_nbytes(dtype, shape)))
        for name, (dtype, shape) in tensors.items()
    ]
    write_safetensors(folder / "model-extra.safetensors", entries)
    weight_map = {**index["weight_map"], **dict.fromkeys(tensors, "model-extra.safetensors")}
    write_index(folder, weight_map, index["metadata"]["total_size"])


@pytest.mark.parametrize(
    ("config", "form"),
    [
        pytest.param("DeepSeek-V4-Flash-Base", "fp8", marks=pytest.mark.thorough),
        ("DeepSeek-V4-Flash-0731", "fp4"),
        pytest.param("DeepSeek-V4-Pro", "fp4", marks=pytest.mark.thorough),
    ],
)
def test_from_a_published_config_to_parity(tmp_path: Path, config: str, form: str) -> None:
    """The config of a release, made small, is all that a checkpoint, its conversion and its golden are made from."""
    (tmp_path / "config.json").write_text(json.dumps(_shrunk(config)))
    dsv4("golden", "make-checkpoint", tmp_path / "hf", "--config", tmp_path / "config.json", "--form", form)
    made = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert made == {**_shrunk(config), "expert_dtype": made["expert_dtype"]}
    assert made["expert_dtype"] == _raw(config)["expert_dtype"] == form
    _, err = dsv4("convert", "hf-to-orbax", tmp_path / "hf", tmp_path / "orbax", "--dtype", "float32")
    words = " ".join(err.split())
    assert "drops" not in words
    out, _ = dsv4("verify", tmp_path / "orbax", "--against", tmp_path / "hf")
    assert "every byte as written" in out
    dsv4("golden", "record", tmp_path / "hf", "--out", tmp_path / "golden", "--random", "140")
    for weights in ([tmp_path / "orbax"], ["--source", tmp_path / "hf"]):
        out, _ = dsv4("parity", *weights, "--golden", tmp_path / "golden", "--mode", "both")
        assert "PASS: all" in out
    generate = ("generate", tmp_path / "orbax", "--tokens", "1,2,3", "-n", "9")
    greedy, _ = dsv4(*generate)
    drafted, err = dsv4(*generate, "--speculative")
    assert drafted == greedy
    assert "of which the model accepted" in err


#: Part of what V4.1-Flash has and no DeepSeek-V4.
_ENGRAM = {f"layers.{layer}.engram.{part}": ("BF16", (2, 2)) for layer in (1, 14) for part in ("embed.weight", "wkv")}
_NEW = "DeepSeek-V4 with parts of V4.1, which dsv4 does not support"


@pytest.mark.parametrize(
    ("config", "tensors", "complaints"),
    [
        (tiny_config(), _ENGRAM, [_NEW, "V4.1 engram memory is not supported: 4 tensors"]),
        ({**tiny_config(), "engram_layer_ids": [1]}, {}, [_NEW, "config.json has engram_layer_ids"]),
        ({**tiny_config(), "vision_config": {}, "text_config": {}}, _ENGRAM, [_NEW, "vision_config, text_config"]),
    ],
    ids=["engram tensors", "engram config", "nested config"],
)
def test_what_is_not_supported_is_refused_in_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    complaints: list[str],
) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    if tensors:
        _add(tmp_path / "hf", tensors)

    def never(*_: object) -> None:
        raise AssertionError("a weight was read")

    for reading in ("read", "read_bytes", "read_rows"):
        monkeypatch.setattr(Checkpoint, reading, never)
    convert = ("convert", "hf-to-orbax", tmp_path / "hf", tmp_path / "orbax")
    commands = (
        convert,
        (*convert, "--dry-run"),
        (*convert, "--layers", "1"),
        ("parity", "--source", tmp_path / "hf", "--golden", GOLDEN),
        ("golden", "record", tmp_path / "hf", "--out", tmp_path / "golden", "--tokens", "1,2,3"),
    )
    for command in commands:
        _, err = dsv4(*command, exit_code=3)
        words = " ".join(err.split())
        for complaint in (*complaints, "dsv4 converts V4-Flash and V4-Pro, their Base variants, dated"):
            assert complaint in words
        assert words.count("error:") == 1
        assert words.startswith(f"error: {tmp_path / 'hf'}: ")
        assert "problems" not in words
        assert "unknown" not in words
        assert not (tmp_path / "orbax").exists()


def test_a_model_of_another_family_is_not_called_vision() -> None:
    """Its model_type says what it is; nested configs are common elsewhere."""
    from dsv4_convert.spec.unsupported import refuse_unsupported

    refuse_unsupported({"model_type": "llava", "text_config": {}, "vision_config": {}}, ["model.layers.0.x"], where="x")


def test_no_supported_release_is_mistaken(tmp_path: Path) -> None:
    from dsv4_convert.spec.unsupported import refuse_unsupported

    for inventory, config in RELEASES:
        refuse_unsupported(_raw(config), headers_of(inventory)[0].tensors, where="x")
