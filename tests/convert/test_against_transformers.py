"""Converted weights, restored by Orbax alone, are bit for bit what transformers loads from the same folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from dsv4_convert.checkpoint import open_checkpoint, write_safetensors
from dsv4_convert.convert import Advance, ConversionOptions, Storage, hf_to_orbax, plan
from dsv4_convert.convert.chunks import ChunkMaker
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import Dialect, Kind, Rule, Transform, parameters, stage_of
from dsv4_convert.spec.v4.names import NAMES, RULES
from dsv4_convert.store import ArrayLayout, open_store, verify
from dsv4_convert.weights.converted import Weights
from dsv4_convert.weights.difference import compare_checkpoints

TORCH = {Storage.BFLOAT16: torch.bfloat16, Storage.FLOAT32: torch.float32}


def _config() -> dict[str, Any]:
    """Wider than the demo's, so that FP8 weights have several tiles in both directions.

    Widths are multiples of 128 or below it: transformers infers the tile from the shapes, which fails at ragged edges.
    """
    return tiny_config(hidden_size=256, moe_intermediate_size=384, q_lora_rank=96, o_lora_rank=128, vocab_size=97)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    for form in ("fp4", "fp8"):
        write_checkpoint(root / form, _config(), seed=3, form=form)
    # transformers cannot save a model that it dequantised while loading, so the weights move to a fresh one first.
    fresh = AutoModelForCausalLM.from_config(_load(root / "fp4", torch.float32).config)
    fresh.load_state_dict(_load(root / "fp4", torch.float32).state_dict())
    fresh.save_pretrained(root / "saved-float32")
    _load(root / "saved-float32", torch.bfloat16).save_pretrained(root / "saved-bfloat16")
    return {path.name: path for path in root.iterdir()}


def _load(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    quantised = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if "saved" not in folder.name else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **quantised)


def test_what_transformers_saves_has_the_values_of_the_release(folders: dict[str, Path]) -> None:
    """Other names, fused experts and another dtype; without the mtp stage, which transformers drops."""
    found = compare_checkpoints(folders["fp4"], folders["saved-float32"])
    assert (found.first.dialect, found.second.dialect) == (Dialect.PUBLISHED, Dialect.TRANSFORMERS)
    assert (found.changed, found.added, found.config) == ((), (), ())
    assert {stage_of(path) for path in found.gone} == {0}
    assert ("FP4, scales float8_e8m0fnu", "float32") in {one.stored for one in found.stored_otherwise}


def _module_name(rule: Rule, layer: int | None) -> tuple[str, int | None]:
    """Where transformers keeps the parameter: its state-dict key, and which half of a fused tensor."""
    numbers = () if layer is None else (layer,)
    if rule.fused is not None:
        return rule.fused.format(*numbers), rule.half
    return rule.template(Dialect.MODULE).format(*numbers), None


def _expected(state: dict[str, torch.Tensor], config: Config, rule: Rule, layer: int | None) -> np.ndarray:
    """The state dict's tensor in the model's layout."""
    key, half = _module_name(rule, layer)
    tensor = state[key]
    if half is not None:
        tensor = tensor.chunk(2, dim=1)[half]
    if rule.transform is Transform.TRANSPOSE:
        tensor = tensor.transpose(-1, -2)
    elif rule.transform is Transform.GROUPED:
        tensor = tensor.reshape(config.o_groups, -1, tensor.shape[1]).transpose(1, 2)
    if tensor.dtype is torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


def _leaf(tree: Any, path: str) -> np.ndarray:
    for part in path.split("."):
        tree = tree[part]
    return np.asarray(tree)


@pytest.mark.parametrize("form", ["fp4", "fp8", "saved-float32", "saved-bfloat16"])
@pytest.mark.parametrize("storage", [Storage.BFLOAT16, Storage.FLOAT32])
def test_bit_equal_to_what_transformers_loads(
    folders: dict[str, Path], tmp_path: Path, form: str, storage: Storage, restored: Callable[[Path], Any]
) -> None:
    hf_to_orbax(folders[form], tmp_path / "orbax", storage=storage)
    tree = restored(tmp_path / "orbax")
    state = _load(folders[form], TORCH[storage]).state_dict()
    config = Weights.open(tmp_path / "orbax").config
    compared = 0
    # transformers knows nothing of mtp stages; test_a_stage_is_what_transformers_loads_as_a_layer compares these.
    for path, rule, layer in parameters(config, range(config.num_hidden_layers)):
        found, expected = _leaf(tree, path), _expected(state, config, rule, layer)
        assert found.shape == expected.shape, path
        if rule.kind is Kind.INTEGER:
            assert (found.dtype, found.tobytes()) == (expected.dtype, expected.tobytes()), path
        else:
            # transformers leaves some BF16 tensors in BF16 and holds others in float32; widening is exact.
            assert found.astype(np.float32).tobytes() == expected.astype(np.float32).tobytes(), path
            if rule.kind.follows_dtype:
                assert found.dtype == storage.dtype, path
        compared += 1
    assert compared == sum(not path.startswith("mtp.") for path in open_store(tmp_path / "orbax").paths)
    assert verify(open_store(tmp_path / "orbax")) == []


@pytest.fixture
def restored() -> Callable[[Path], Any]:
    return lambda path: ocp.StandardCheckpointer().restore(path)


@pytest.mark.parametrize("form", ["fp4", "fp8", "saved-float32", "saved-bfloat16"])
def test_source_storage_decodes_to_the_same_numbers(folders: dict[str, Path], tmp_path: Path, form: str) -> None:
    hf_to_orbax(folders[form], tmp_path / "plain", storage=Storage.FLOAT32)
    hf_to_orbax(folders[form], tmp_path / "source", storage=Storage.SOURCE)
    plain, source = Weights.open(tmp_path / "plain"), Weights.open(tmp_path / "source")
    for path, _, _ in parameters(plain.config):
        assert plain.read(path).tobytes() == source.read(path).tobytes(), path


def test_source_storage_keeps_the_published_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors import deserialize

    hf_to_orbax(folders["fp4"], tmp_path / "source", storage=Storage.SOURCE)
    store = open_store(tmp_path / "source")
    published = {
        name: tensor["data"]
        for shard in folders["fp4"].glob("*.safetensors")
        for name, tensor in deserialize(shard.read_bytes())
    }
    seen = set()
    for path in store.paths:
        record = store.manifest.leaves[path]
        stored = store.read(path).tobytes()
        assert stored == b"".join(bytes(published[name]) for name in record.sources), path
        seen.update(record.sources)
    assert set(published) == seen
    assert any(name.startswith("mtp.0.") for name in seen)


def test_module_names_give_the_same_parameters(folders: dict[str, Path], tmp_path: Path) -> None:
    """A state dict saved under transformers' attribute names, experts fused."""
    from safetensors.torch import save_file

    model = _load(folders["fp4"], torch.float32)
    (tmp_path / "module").mkdir()
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "module/model.safetensors"
    )
    (tmp_path / "module/config.json").write_text((folders["saved-float32"] / "config.json").read_text())
    hf_to_orbax(tmp_path / "module", tmp_path / "a", storage=Storage.FLOAT32)
    hf_to_orbax(folders["fp4"], tmp_path / "b", storage=Storage.FLOAT32)
    a, b = open_store(tmp_path / "a"), open_store(tmp_path / "b")
    assert a.metadata["dialect"] == "module"
    assert set(a.paths) == {path for path in b.paths if not path.startswith("mtp.")}
    for path in a.paths:
        assert np.array_equal(a.read(path).astype(np.float32), b.read(path).astype(np.float32)), path


def test_module_names_with_scales_expert_by_expert(folders: dict[str, Path], tmp_path: Path) -> None:
    """The release's own bytes under the names that other tools write: q_a_proj.weight, q_a_proj.weight_scale_inv."""
    (tmp_path / "module").mkdir()
    with open_checkpoint(folders["fp4"]) as checkpoint:
        entries = []
        for name, info in checkpoint.tensors.items():
            if stage_of(name) is None:
                (item,) = NAMES.explain(name)
                weight, *scales = item.spellings[Dialect.MODULE]
                spelled = scales[0] if name.endswith(".scale") else weight
                entries.append((spelled, info.dtype, info.shape, checkpoint.read_bytes(name)))
        write_safetensors(tmp_path / "module" / "model.safetensors", entries)
    (tmp_path / "module" / "config.json").write_text((folders["fp4"] / "config.json").read_text())
    hf_to_orbax(tmp_path / "module", tmp_path / "a")
    hf_to_orbax(folders["fp4"], tmp_path / "b")
    a, b = open_store(tmp_path / "a"), open_store(tmp_path / "b")
    assert a.metadata["dialect"] == "module"
    assert {path: leaf.digest for path, leaf in a.manifest.leaves.items()} == {
        path: leaf.digest for path, leaf in b.manifest.leaves.items() if stage_of(path) is None
    }


@pytest.mark.parametrize("form", ["fp4", "fp8"])
def test_a_stage_is_what_transformers_loads_as_a_layer(folders: dict[str, Path], tmp_path: Path, form: str) -> None:
    """transformers drops ``mtp.0``, so its tensors are renamed to one more window-only, score-routed layer."""
    raw = json.loads((folders[form] / "config.json").read_text())
    last = raw["num_hidden_layers"]
    ratios = [*raw["compress_ratios"][:last], 0]
    (tmp_path / "longer").mkdir()
    (tmp_path / "longer" / "config.json").write_text(
        json.dumps({**raw, "num_hidden_layers": last + 1, "compress_ratios": ratios, "num_nextn_predict_layers": 0})
    )
    with open_checkpoint(folders[form]) as checkpoint:
        entries = [
            (name.replace("mtp.0.", f"layers.{last}."), info.dtype, info.shape, checkpoint.read_bytes(name))
            for name, info in checkpoint.tensors.items()
        ]
        write_safetensors(tmp_path / "longer" / "model.safetensors", entries)
    state = _load(tmp_path / "longer", torch.float32).state_dict()
    hf_to_orbax(folders[form], tmp_path / "orbax", storage=Storage.FLOAT32)
    weights = Weights.open(tmp_path / "orbax")
    layer_rules = {rule.path: rule for rule in RULES}
    compared = 0
    for path, stage_rule, layer in parameters(weights.config):
        rule = layer_rules.get(stage_rule.path.replace("mtp.", "layers."))
        if stage_rule.per_stage and rule is not None:
            assert layer == last
            expected = _expected(state, weights.config, rule, last)
            assert weights.read(path).tobytes() == expected.astype(np.float32).tobytes(), path
            compared += 1
    assert compared == len(layer_rules) - 6 - 10 - 2, (
        "all but the model level, compressors with indexer, the hash table, and the bias of image tokens"
    )


def test_a_process_without_dsv4_restores_it(folders: dict[str, Path], tmp_path: Path) -> None:
    """A plain Orbax restore of a real conversion, where dsv4 cannot even be imported."""
    hf_to_orbax(folders["fp4"], tmp_path / "orbax")
    script = """
import sys, json
import numpy as np, orbax.checkpoint as ocp
tree = ocp.StandardCheckpointer().restore(sys.argv[1])
assert not {"dsv4_convert", "parity", "golden", "torch"} & set(sys.modules)
experts = np.asarray(tree["layers"]["2"]["ffn"]["experts"]["w1"])
print(json.dumps([str(experts.dtype), list(experts.shape), float(experts.astype(np.float64).sum())]))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, str(tmp_path / "orbax")], capture_output=True, text=True, check=True
    )
    dtype, shape, total = json.loads(done.stdout)
    expected = open_store(tmp_path / "orbax").read("layers.2.ffn.experts.w1")
    assert (dtype, shape) == ("bfloat16", list(expected.shape))
    assert total == expected.astype(np.float64).sum()


def test_what_travels_with_it(folders: dict[str, Path], tmp_path: Path) -> None:
    """The config, the version of the names table and where the source is from."""
    hf_to_orbax(folders["fp4"], tmp_path / "orbax", options=ConversionOptions(name="acme/v4", revision="ab" * 20))
    metadata = open_store(tmp_path / "orbax").metadata
    assert (tmp_path / "orbax" / "config.json").read_bytes() == (folders["fp4"] / "config.json").read_bytes()
    assert metadata["source"]["name"] == "acme/v4"
    assert metadata["source"]["revision"] == "ab" * 20
    assert metadata["names_table"] == 1
    assert Config.from_json(metadata["config"]) == Config.from_file(folders["fp4"] / "config.json")
    assert metadata["tensors"]["dropped"] == {}
    assert metadata["rounding"]["rounded"] == 0
    assert metadata["rounding"]["values"] > 10_000


def test_rounding_is_counted(folders: dict[str, Path], tmp_path: Path) -> None:
    """Float32 scales that are no powers of two: bfloat16 cannot hold all products, and the manifest says how many."""
    planned, _ = hf_to_orbax(folders["fp8"], tmp_path / "orbax")
    hf_to_orbax(folders["fp8"], tmp_path / "exact", storage=Storage.FLOAT32)
    narrow, exact = open_store(tmp_path / "orbax"), open_store(tmp_path / "exact")
    changed, largest = {}, 0.0
    for path in planned.inexact:
        wanted = exact.read(path).astype(np.float64)
        found = narrow.read(path).astype(np.float64)
        if count := int((wanted != found).sum()):
            changed[path] = count
            largest = max(largest, float(np.max(np.abs(wanted - found)[wanted != 0] / np.abs(wanted[wanted != 0]))))
    entry = narrow.metadata["rounding"]
    assert entry["leaves"] == changed
    assert entry["rounded"] == sum(changed.values()) > 1000
    assert entry["largest_relative"] == pytest.approx(largest)
    assert exact.metadata["rounding"]["rounded"] == 0


def test_an_interrupted_conversion_goes_on_with_the_same_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    hf_to_orbax(folders["fp4"], tmp_path / "whole")

    def interrupt(advance: Advance) -> None:
        if advance.written > advance.to_write / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf_to_orbax(folders["fp4"], tmp_path / "orbax", progress=interrupt)
    assert not (tmp_path / "orbax").exists()
    _, summary = hf_to_orbax(folders["fp4"], tmp_path / "orbax")
    assert summary.kept_bytes > summary.total_bytes / 2
    whole, resumed = open_store(tmp_path / "whole"), open_store(tmp_path / "orbax")
    assert whole.manifest.leaves == resumed.manifest.leaves
    assert verify(resumed) == []


def test_large_matrices_are_cut_at_whole_tiles(folders: dict[str, Path]) -> None:
    """However small the chunks are asked to be, decoding them one by one gives the same matrix."""
    with open_checkpoint(folders["fp8"]) as checkpoint:
        config = Config.from_hf(checkpoint.config)
        maker = ChunkMaker(checkpoint, experts=config.n_routed_experts)
        whole = {
            stored_leaf.path: stored_leaf for stored_leaf in plan(checkpoint, config, Storage.FLOAT32).stored_leaves
        }
        for stored_leaf in plan(checkpoint, config, Storage.FLOAT32, chunk_bytes=1).stored_leaves:
            layout = ArrayLayout(shape=stored_leaf.shape, dtype=stored_leaf.dtype, chunk_shape=stored_leaf.chunk_shape)
            assembled = np.empty(stored_leaf.shape, stored_leaf.dtype)
            for index in layout.chunk_indices():
                assembled[layout.chunk_region(index)] = maker.chunk(stored_leaf, index)
            one = ArrayLayout(
                shape=stored_leaf.shape, dtype=stored_leaf.dtype, chunk_shape=whole[stored_leaf.path].chunk_shape
            )
            for index in one.chunk_indices():
                expected = maker.chunk(whole[stored_leaf.path], index)
                assert np.array_equal(assembled[one.chunk_region(index)], expected), stored_leaf.path
        assert (
            sum(
                stored_leaf.chunk_shape != whole[stored_leaf.path].chunk_shape
                for stored_leaf in plan(checkpoint, config, Storage.FLOAT32, chunk_bytes=1).stored_leaves
            )
            > 10
        )
