"""The way back: the published bytes again, a folder that transformers loads, and the published form quantised anew."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from dsv4_convert.checkpoint import open_checkpoint, write_safetensors
from dsv4_convert.convert import Storage, hf_to_orbax, to_hf
from dsv4_convert.convert.against import compare_with_source
from dsv4_convert.convert.to_hf import orbax_to_hf
from dsv4_convert.errors import BadInput, CheckFailed, UsageError
from dsv4_convert.formats import quantize_fp4, quantize_fp8
from dsv4_convert.formats.weight import decode_weight
from dsv4_convert.golden.synthetic import dspark_config, tiny_config, write_checkpoint
from dsv4_convert.spec.names import Dialect
from dsv4_convert.spec.v4.names import NAMES
from dsv4_convert.store import open_store, verify

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
TOKENS = torch.arange(1, 24)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """FP4 with FP8 as the releases have it, FP8 with F32 scales as Base has it; both wider than one tile. And a dated
    release, with DSpark's draft."""
    root = tmp_path_factory.mktemp("to-hf")
    config = tiny_config(hidden_size=256, moe_intermediate_size=384, q_lora_rank=96, o_lora_rank=128, vocab_size=97)
    write_checkpoint(root / "dspark", dspark_config(hidden_size=160), seed=3)
    for storage in (Storage.SOURCE, Storage.BFLOAT16):
        hf_to_orbax(root / "dspark", root / f"dspark-{storage}", storage=storage)
    for form in ("fp4", "fp8"):
        write_checkpoint(root / form, config, seed=3, form=form)
        for storage in Storage:
            hf_to_orbax(root / form, root / f"{form}-{storage}", storage=storage)
    return {path.name: path for path in root.iterdir()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, as safetensors itself reads it."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = load_file(file)
        assert not found.keys() & loaded.keys()
        found |= loaded
    return found


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(
        left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("form", ["fp4", "fp8", "dspark"])
def test_the_published_folder_comes_back(folders: dict[str, Path], tmp_path: Path, form: str) -> None:
    summary = orbax_to_hf(folders[f"{form}-source"], tmp_path / "back")
    before, after = tensors(folders[form]), tensors(tmp_path / "back")
    kept = set(before)
    assert any(name.startswith("mtp.0.") for name in kept)
    assert set(after) == kept
    assert [name for name in kept if not same(before[name], after[name])] == []
    assert summary.identical == summary.tensors == len(kept)
    assert summary.left_out == {}
    with open_checkpoint(folders[form]) as first, open_checkpoint(tmp_path / "back") as second:
        for name in kept:
            assert first.tensors[name].file.name == second.tensors[name].file.name
            assert first.tensors[name].dtype == second.tensors[name].dtype
        assert first.config == second.config
    assert not list(tmp_path.glob("*.dsv4-partial"))
    hf_to_orbax(tmp_path / "back", tmp_path / "again", storage=Storage.SOURCE)


def test_a_part_of_the_layers_comes_back(folders: dict[str, Path], tmp_path: Path) -> None:
    """Also where the source has stages after the backbone, which do not belong to a part."""
    hf_to_orbax(folders["fp4"], tmp_path / "part", storage=Storage.SOURCE, layers=[1])
    summary = orbax_to_hf(tmp_path / "part", tmp_path / "back")
    before, after = tensors(folders["fp4"]), tensors(tmp_path / "back")
    assert {name for name in before if name.startswith("layers.1.")} < set(after)
    assert not [name for name in after if name.startswith(("layers.0.", "mtp.")) or not same(before[name], after[name])]
    assert summary.left_out == {"belongs to a layer that was not asked for": len(before) - len(after)}


@pytest.mark.parametrize("storage", [Storage.BFLOAT16, Storage.FLOAT32])
def test_transformers_loads_the_plain_folder_and_gives_the_same_logits(
    folders: dict[str, Path], tmp_path: Path, storage: Storage
) -> None:
    orbax_to_hf(folders[f"fp4-{storage}"], tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == storage
    # The stage is there too, decoded, and the reference drops it again.
    assert "mtp.0.e_proj.weight" in tensors(tmp_path / "plain")
    quantized = {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    reference = AutoModelForCausalLM.from_pretrained(folders["fp4"], dtype=torch.float32, **quantized).float().eval()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).float().eval()
    expected, found = reference.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    with torch.no_grad():
        assert torch.equal(reference(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("form", "storage"),
    [
        *((form, storage) for form in ("fp4", "fp8") for storage in (Storage.BFLOAT16, Storage.FLOAT32)),
        ("dspark", Storage.BFLOAT16),
    ],
)
def test_quantising_again_gives_the_same_values(
    folders: dict[str, Path], tmp_path: Path, form: str, storage: Storage
) -> None:
    """Power-of-two scales: not one value changes. Float32 scales: as many as are counted."""
    summary = orbax_to_hf(folders[f"{form}-{storage}"], tmp_path / "back", requantize=True)
    assert (tmp_path / "back" / "config.json").read_bytes() == (folders[form] / "config.json").read_bytes()
    before, after = tensors(folders[form]), tensors(tmp_path / "back")
    for name, tensor in after.items():
        assert (tensor.dtype, tensor.shape) == (before[name].dtype, before[name].shape), name
    hf_to_orbax(tmp_path / "back", tmp_path / "again", storage=storage)
    from dsv4_convert.store import open_store

    first, again = open_store(folders[f"{form}-{storage}"]), open_store(tmp_path / "again")
    differing: dict[str, int] = {}
    for path in first.paths:
        left, right = (store.read(path).astype(np.float64) for store in (first, again))
        if count := int((left != right).sum()):
            differing[path] = count
    assert sum(summary.changed.values()) == sum(differing.values())
    assert summary.quantized == sum(name.endswith(".scale") for name in after)
    if form != "fp8":
        assert differing == {}
        assert summary.identical > len(after) / 2


def test_the_numbers_of_a_dspark_draft_are_those_of_its_tensors(folders: dict[str, Path]) -> None:
    """Decoded by torch, in the orientation in which the model multiplies."""
    from dsv4_convert.store import open_store

    source, store = tensors(folders["dspark"]), open_store(folders["dspark-bfloat16"])

    def found(path: str) -> torch.Tensor:
        return torch.tensor(store.read(path).astype(np.float32))

    scale = source["mtp.0.main_proj.scale"].float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    decoded = source["mtp.0.main_proj.weight"].float() * scale[:160, :480]
    assert torch.equal(found("mtp.0.main_proj"), decoded.T)
    assert torch.equal(found("mtp.0.main_norm"), source["mtp.0.main_norm.weight"].float())
    for name, transposed in (
        ("markov_head.markov_w1", False),
        ("markov_head.markov_w2", True),
        ("confidence_head.proj", True),
    ):
        tensor = source[f"mtp.2.{name}.weight"].float()
        assert torch.equal(found(f"mtp.2.{name}"), tensor.T if transposed else tensor)
    assert {path.split(".")[1] for path in store.paths if path.startswith("mtp.")} == {"0", "1", "2"}


def test_module_names_and_fused_experts_come_back(folders: dict[str, Path], tmp_path: Path) -> None:
    """A state dict under transformers' own names: gate and up rows of all experts in one tensor."""
    quantized = {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(folders["fp4"], dtype=torch.float32, **quantized)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    spelling = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}

    def raw(tensor: torch.Tensor) -> bytes:
        return tensor.view(torch.uint8).numpy().tobytes()

    (tmp_path / "module").mkdir()
    config = json.loads((folders["fp4"] / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("quantization_config", "expert_dtype")}
    (tmp_path / "module" / "config.json").write_text(json.dumps(config))
    entries = [(name, spelling[tensor.dtype], tuple(tensor.shape), raw(tensor)) for name, tensor in state.items()]
    write_safetensors(tmp_path / "module" / "model.safetensors", entries)
    with open_checkpoint(tmp_path / "module") as checkpoint:
        assert any(name.endswith("experts.gate_up_proj") for name in checkpoint.tensors)
    hf_to_orbax(tmp_path / "module", tmp_path / "source", storage=Storage.SOURCE)
    orbax_to_hf(tmp_path / "source", tmp_path / "back")
    after = tensors(tmp_path / "back")
    assert set(after) == set(state)
    assert [name for name in state if not same(state[name], after[name])] == []
    # Decoded storage gives the published names, whatever the source's were.
    hf_to_orbax(tmp_path / "module", tmp_path / "plain", storage=Storage.FLOAT32)
    orbax_to_hf(tmp_path / "plain", tmp_path / "published")
    for name in tensors(tmp_path / "published"):
        assert name in NAMES.explain(name)[0].spellings[Dialect.PUBLISHED]


def test_a_flipped_bit_is_named_and_nothing_appears(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["fp4-source"], tmp_path / "orbax")
    chunk = tmp_path / "orbax" / "layers.2.ffn.experts.w3.weight" / "4.0.0"
    data = bytearray(chunk.read_bytes())
    data[77] ^= 4
    chunk.write_bytes(data)
    with pytest.raises(CheckFailed, match=r"layers\.2\.ffn\.experts\.4\.w3\.weight: the stored bytes have digest"):
        orbax_to_hf(tmp_path / "orbax", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def in_version_1(orbax: Path, published: Path) -> None:
    """Rewrite what dsv4 says of a conversion as earlier versions did: each digest is a SHA-256, its digits alone."""
    found = tensors(published)
    stored = {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in found.items()}
    sources = json.loads((orbax / "dsv4_sources.json").read_bytes())
    for name, entry in sources["tensors"].items():
        del entry["digest"]
        entry["sha256"] = hashlib.sha256(stored[name]).hexdigest()
    (orbax / "dsv4_sources.json").write_text(json.dumps(sources | {"schema_version": 1}))
    manifest = json.loads((orbax / "dsv4_manifest.json").read_bytes())
    for path, entry in manifest["leaves"].items():
        assert all(size % chunk == 0 for size, chunk in zip(entry["shape"], entry["chunk_shape"], strict=True))
        grid = np.ndindex(*(size // chunk for size, chunk in zip(entry["shape"], entry["chunk_shape"], strict=True)))
        files = [orbax / path / (".".join(map(str, index)) or "0") for index in grid]
        raw = [hashlib.sha256(file.read_bytes()) for file in files]
        entry["chunk_digests"] = [digest.hexdigest() for digest in raw]
        entry["digest"] = hashlib.sha256(b"".join(digest.digest() for digest in raw)).hexdigest()
    manifest["files"] = {name: hashlib.sha256((orbax / name).read_bytes()).hexdigest() for name in manifest["files"]}
    manifest["schema_version"] = 1
    del manifest["manifest_digest"]
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    manifest["manifest_digest"] = hashlib.sha256(text.encode()).hexdigest()
    (orbax / "dsv4_manifest.json").write_text(json.dumps(manifest))


def test_a_conversion_of_version_1_is_verified_and_comes_back(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["fp4-source"], tmp_path / "orbax")
    in_version_1(tmp_path / "orbax", folders["fp4"])
    assert verify(open_store(tmp_path / "orbax")) == []
    assert compare_with_source(open_store(tmp_path / "orbax"), folders["fp4"]) == []
    summary = orbax_to_hf(tmp_path / "orbax", tmp_path / "back")
    assert summary.identical == summary.tensors == len(tensors(folders["fp4"]))
    chunk = tmp_path / "orbax" / "layers.2.ffn.experts.w3.weight" / "4.0.0"
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    assert "chunk (4, 0, 0)" in verify(open_store(tmp_path / "orbax"))[0]
    with pytest.raises(CheckFailed, match=r"layers\.2\.ffn\.experts\.4\.w3\.weight: the stored bytes have digest"):
        orbax_to_hf(tmp_path / "orbax", tmp_path / "damaged")


def test_an_interrupted_export_goes_on(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = to_hf.write_safetensors

    def counted(path: Path, *arguments: Any, **options: Any) -> None:
        if len(written) == 3:
            written.append("interrupted")
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, *arguments, **options)

    monkeypatch.setattr(to_hf, "write_safetensors", counted)
    with pytest.raises(KeyboardInterrupt):
        orbax_to_hf(folders["fp4-bfloat16"], tmp_path / "back", requantize=True)
    assert not (tmp_path / "back").exists()
    with pytest.raises(UsageError, match=r"(?s)an unfinished export with other.*requantize: True then, False now"):
        orbax_to_hf(folders["fp4-source"], tmp_path / "back")
    with pytest.raises(UsageError, match=r"an unfinished export.*\n.*manifest: "):
        orbax_to_hf(folders["fp8-source"], tmp_path / "back")
    summary = orbax_to_hf(folders["fp4-bfloat16"], tmp_path / "back", requantize=True)
    assert len(written) == len(set(written)) == len(summary.shards) + 1
    whole = orbax_to_hf(folders["fp4-bfloat16"], tmp_path / "whole", requantize=True)
    assert summary == whole
    assert {file.name: file.read_bytes() for file in (tmp_path / "back").iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()
    }


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_weight_is_counted_once_whose_scale_is_in_another_shard(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    """Every scale moves to the shard before its weight's, or after it for the first."""
    shutil.copytree(folders["fp8"], tmp_path / "hf")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    loaded = [load_file(file) for file in files]
    moved: list[dict[str, torch.Tensor]] = [{} for _ in files]
    for number, held in enumerate(loaded):
        for name, tensor in held.items():
            moved[(number or 2) - 1 if name.endswith(".scale") else number][name] = tensor
    for file, held in zip(files, moved, strict=True):
        save_file(held, file, metadata={"format": "pt"})
    weight_map = {name: file.name for file, held in zip(files, moved, strict=True) for name in held}
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    hf_to_orbax(tmp_path / "hf", tmp_path / "orbax")
    if interrupted:
        real = to_hf.write_safetensors

        def failing(file: Path, *arguments: Any, **options: Any) -> None:
            if file.name.startswith("model-00003"):
                raise OSError(28, "No space left on device")
            real(file, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(to_hf, "write_safetensors", failing)
            with pytest.raises(OSError, match="No space"):
                orbax_to_hf(tmp_path / "orbax", tmp_path / "back", requantize=True)
    split = orbax_to_hf(tmp_path / "orbax", tmp_path / "back", requantize=True)
    whole = orbax_to_hf(folders["fp8-bfloat16"], tmp_path / "whole", requantize=True)
    assert whole.changed
    assert (split.quantized, split.changed) == (whole.quantized, whole.changed)
    first, second = tensors(tmp_path / "back"), tensors(tmp_path / "whole")
    assert all(same(first[name], second[name]) for name in second)


def test_small_shards_of_a_plain_copy(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_hf, "_SHARD_BYTES", 2_000_000)
    summary = orbax_to_hf(folders["fp4-bfloat16"], tmp_path / "plain")
    assert len(summary.shards) > 3
    assert summary.shards[0] == f"model-00001-of-{len(summary.shards):05}.safetensors"
    hf_to_orbax(tmp_path / "plain", tmp_path / "again")


def test_what_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds the published bytes already"):
        orbax_to_hf(folders["fp4-source"], tmp_path / "back", requantize=True)
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        orbax_to_hf(folders["fp4-source"], tmp_path / "there")
    with pytest.raises(BadInput, match="not converted yet"):
        orbax_to_hf(folders["fp4"], tmp_path / "back")
    orbax_to_hf(folders["fp4-bfloat16"], tmp_path / "plain")
    hf_to_orbax(tmp_path / "plain", tmp_path / "orbax")
    with pytest.raises(UsageError, match="its source was not quantised"):
        orbax_to_hf(tmp_path / "orbax", tmp_path / "back", requantize=True)


@given(st.integers(0, 2**32 - 1), st.integers(30, 220), st.integers(0, 8))
def test_values_of_a_power_of_two_scale_survive_any_quantiser(seed: int, byte: int, below: int) -> None:
    """Codes that do not use the upper end of their range get a smaller scale, under which they still are codes."""
    rng = np.random.default_rng(seed)
    limit = 0x7E - 8 * below
    codes = (rng.integers(0, limit + 1, (128, 128)) | rng.choice([0, 128], (128, 128))).astype(np.uint8).view(FP8)
    scale = np.full((1, 1), byte, np.uint8)
    values = decode_weight(codes, scale, block=(128, 128), dtype=np.dtype(ml_dtypes.bfloat16))
    again = decode_weight(*_as_fp8(quantize_fp8(values)), block=(128, 128), dtype=np.dtype(ml_dtypes.bfloat16))
    assert np.array_equal(values, again)
    packed = rng.integers(0, 256, (8, 16), np.uint8) & np.uint8([0xFF, 0xBB, 0x99][below % 3])
    groups = np.full((8, 1), byte, np.uint8)
    values = decode_weight(packed, groups, dtype=np.dtype(ml_dtypes.bfloat16))
    assert np.array_equal(values, decode_weight(*quantize_fp4(values), dtype=np.dtype(ml_dtypes.bfloat16)))


def _as_fp8(quantized: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return quantized[0].view(FP8), quantized[1]
