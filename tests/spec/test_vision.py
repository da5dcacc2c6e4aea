"""V4-Flash-Vision-Exp: every tensor and byte is known, text is computed as without vision, and all comes back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.torch import load_file

from dsv4_convert.convert import Layout, Storage, hf_to_orbax
from dsv4_convert.convert.to_hf import orbax_to_hf
from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.golden.synthetic import dspark_config, write_checkpoint
from dsv4_convert.inspection.look import inspect
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.coverage import Stored, resolve
from dsv4_convert.weights.converted import Weights
from dsv4_convert.weights.published import PublishedWeights
from dsv4_convert.weights.restore import restore_model

DATA = Path(__file__).parents[1] / "data"
#: Fields of its config that V4-Flash-0731 has not, or has otherwise; several public notes agree on them.
FIELDS = {
    "rms_norm_eps": 1e-20, "num_nextn_predict_layers": 3, "vision_n_layers": 32, "vision_dim": 1024,
    "vision_n_heads": 16, "vision_inter_dim": 2816, "vision_patch_size": 14, "vision_rope_theta": 10000,
    "vision_downsample_ratio": 3, "vision_max_n_token": 384, "vision_min_pixels": 147456, "vision_max_wh_ratio": 8,
}  # fmt: skip
#: Its tensors and their bytes, as its repository states them; 316 more tensors than V4-Flash-0731.
TENSORS, NBYTES, MORE = 72_633, 167_811_372_792, 316
#: A small one.
TINY = {
    **FIELDS, "vision_n_layers": 2, "vision_dim": 32, "vision_n_heads": 2, "vision_inter_dim": 48,
    "vision_patch_size": 2,
}  # fmt: skip


def shapes() -> dict[str, Stored]:
    """The further tensors, written out as public inventories have them."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "vision.patch_embed.proj.weight": ("BF16", (1024, 588)),
        "vision.patch_embed.proj.bias": ("BF16", (1024,)),
        "vision.norm.weight": ("BF16", (1024,)),
        "aligner.w1.weight": ("BF16", (4096, 9216)),
        "aligner.w1.bias": ("BF16", (4096,)),
        "aligner.w2.weight": ("BF16", (4096, 4096)),
        "aligner.w2.bias": ("BF16", (4096,)),
    }
    found |= {f"image_{part}": ("BF16", (4096,)) for part in ("start", "pad", "newline", "end")}
    for block in range(32):
        prefix = f"vision.blocks.{block}."
        found |= {f"{prefix}norm{number}.weight": ("BF16", (1024,)) for number in (1, 2)}
        for name, out in (("wqkv", 3072), ("wo", 1024)):
            found[f"{prefix}attn.{name}.weight"] = ("BF16", (out, 1024))
            found[f"{prefix}attn.{name}.bias"] = ("BF16", (out,))
        found[f"{prefix}mlp.w1.weight"] = ("BF16", (5632, 1024))
        found[f"{prefix}mlp.w2.weight"] = ("BF16", (1024, 2816))
    routers = [*(f"layers.{layer}" for layer in range(43)), *(f"mtp.{stage}" for stage in range(3))]
    found |= {f"{router}.ffn.gate.bias_vl": ("F32", (256,)) for router in routers}
    found |= {f"layers.{layer}.ffn.gate.bias": ("F32", (256,)) for layer in range(3)}
    return {name: Stored(dtype, shape) for name, (dtype, shape) in found.items()}


@pytest.fixture(scope="module")
def release() -> tuple[dict[str, Stored], Config]:
    document = json.loads((DATA / "inventory" / "DeepSeek-V4-Flash-0731.json").read_text())
    stored = {
        name.replace("{e}", str(expert)): Stored(dtype, tuple(shape))
        for name, (dtype, shape) in document["tensors"].items()
        for expert in range(document["n_experts"] if "{e}" in name else 1)
    }
    more = shapes()
    assert len(more) == MORE
    assert len(stored | more) == TENSORS
    width = {"BF16": 2, "F32": 4}
    assert document["summary"]["bytes"] + sum(math.prod(t.shape) * width[t.dtype] for t in more.values()) == NBYTES
    raw = json.loads((DATA / "configs" / "DeepSeek-V4-Flash-0731.json").read_text())
    return stored | more, Config.from_hf(raw | FIELDS)


def test_every_tensor_of_the_release_has_exactly_one_use(release: tuple[dict[str, Stored], Config]) -> None:
    stored, config = release
    assert config.rms_norm_eps == 1e-20
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    uses = [name for leaf in resolve(stored, config).leaves for source in leaf.sources for name in source.names]
    assert len(uses) == len(set(uses))
    assert set(uses) == set(stored)


@pytest.mark.parametrize(
    ("name", "found", "complaint"),
    [
        ("layers.0.ffn.gate.bias_vl", None, "layers.0.ffn.gate.bias_vl: missing"),
        ("layers.2.ffn.gate.bias", None, "layers.2.ffn.gate.bias: missing"),
        ("mtp.2.ffn.gate.bias_vl", None, "mtp.2.ffn.gate.bias_vl: missing"),
        ("image_pad", None, "image_pad: missing"),
        ("vision.blocks.31.attn.wo.bias", None, "vision.blocks.31.attn.wo.bias: missing"),
        ("vision.blocks.32.norm1.weight", Stored("BF16", (1024,)), "the config has 32 vision blocks"),
        ("aligner.w1.weight", Stored("BF16", (4096, 1024)), "aligner.w1.weight: expected shape [4096, 9216]"),
        ("vision.blocks.0.mlp.w3.weight", Stored("BF16", (2816, 1024)), "unknown tensor"),
    ],
)
def test_refuses_what_does_not_fit(
    release: tuple[dict[str, Stored], Config], name: str, found: Stored | None, complaint: str
) -> None:
    stored, config = release
    changed = {key: tensor for key, tensor in {**stored, name: found}.items() if tensor is not None}
    with pytest.raises(BadInput) as caught:
        resolve(changed, config)
    assert complaint in str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision") / "hf"
    write_checkpoint(folder, dspark_config(**TINY), seed=5)
    return folder


@pytest.mark.parametrize("storage", [Storage.SOURCE, Storage.BFLOAT16])
def test_what_is_not_run_comes_back_byte_for_byte(folder: Path, tmp_path: Path, storage: Storage) -> None:
    planned, _ = hf_to_orbax(folder, tmp_path / "orbax", storage=storage)
    assert not planned.dropped
    orbax_to_hf(tmp_path / "orbax", tmp_path / "back")
    before, after = (_tensors(place) for place in (folder, tmp_path / "back"))
    own = [name for name in before if name.startswith(("vision.", "aligner.", "image_")) or "bias" in name]
    assert len(own) == 2 * 8 + 3 + 4 + 4 + 7 + 7
    for name in before if storage is Storage.SOURCE else own:
        assert np.array_equal(before[name], after[name]), name
    for place in (folder, tmp_path / "orbax"):
        found = inspect(str(place))
        assert "vision encoder" in found.facts["not run"]
        assert not found.odd


def _tensors(folder: Path) -> dict[str, Any]:
    """The bytes of every tensor."""
    import torch

    return {
        name: tensor.contiguous().view(torch.uint8).numpy()
        for shard in folder.glob("*.safetensors")
        for name, tensor in load_file(shard).items()
    }


def test_text_is_computed_as_without_vision(folder: Path, tmp_path: Path) -> None:
    """Also by hash-routed layers, which have a bias here, for image tokens alone."""
    plain = {name: value for name, value in TINY.items() if not name.startswith("vision_")}
    write_checkpoint(tmp_path / "plain", dspark_config(**plain), seed=5)
    hf_to_orbax(folder, tmp_path / "orbax")
    ids = jnp.arange(40).reshape(2, 20)
    expected = restore_model(PublishedWeights.open(tmp_path / "plain"))(ids)
    assert np.array_equal(restore_model(Weights.open(tmp_path / "orbax"))(ids), expected)


def test_maxtext_has_no_place_for_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no DeepSeek-V4 with a vision encoder"):
        hf_to_orbax(folder, tmp_path / "orbax", layout=Layout.MAXTEXT)
