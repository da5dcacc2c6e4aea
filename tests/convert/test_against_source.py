"""Verification against the source: equal bits pass; a change on either side is named, with the side that changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from blake3 import blake3
from safetensors import safe_open

from dsv4_convert.checkpoint import open_checkpoint
from dsv4_convert.convert import Storage, hf_to_orbax
from dsv4_convert.convert.against import compare_with_source
from dsv4_convert.convert.sources import SOURCES_FILE, read_sources
from dsv4_convert.errors import BadInput
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.store import open_store, verify


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("against") / "hf"
    write_checkpoint(folder, tiny_config())
    return folder


@pytest.fixture(scope="module")
def converted(tiny: Path) -> dict[Storage, Path]:
    folders = {storage: tiny.parent / storage.value for storage in Storage}
    for storage, folder in folders.items():
        hf_to_orbax(tiny, folder, storage=storage)
    return folders


def stored_tensors(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor, cut out of the files by the offsets in their headers, as the format describes them."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                found[name] = data[8 + length + start : 8 + length + end]
        with safe_open(file, "pt") as same:
            assert set(same.keys()) <= found.keys()
    return found


def flip(file: Path, position: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("storage", Storage)
def test_a_conversion_equals_its_source(tiny: Path, converted: dict[Storage, Path], storage: Storage) -> None:
    store = open_store(converted[storage])
    calls: list[tuple[int, int, str]] = []
    assert compare_with_source(store, tiny, lambda *call: calls.append(call)) == []
    assert calls[-1][0] == calls[-1][1] == sum(store.leaf(path).nbytes for path in store.paths)


@pytest.mark.parametrize("storage", Storage)
def test_every_source_tensor_is_accounted_for(tiny: Path, converted: dict[Storage, Path], storage: Storage) -> None:
    """The digest of its bytes and its targets, and no reason why it has none; every leaf's sources say the same."""
    store = open_store(converted[storage])
    sources = read_sources(store)
    stored = stored_tensors(tiny)
    assert set(sources.tensors) == set(stored)
    for name, tensor in sources.tensors.items():
        assert tensor.dropped is None, name
        assert tensor.digest == f"blake3:{blake3(stored[name]).hexdigest()}", name
        assert tensor.targets, name
    for path, record in store.manifest.leaves.items():
        assert record.sources, path
        assert {name for name, tensor in sources.tensors.items() if path in tensor.targets} == set(record.sources)
    assert {name: shard.size for name, shard in sources.shards.items()} == {
        file.name: file.stat().st_size for file in tiny.glob("*.safetensors")
    }


def test_layers_that_were_not_asked_for_have_a_reason(tiny: Path, tmp_path: Path) -> None:
    hf_to_orbax(tiny, tmp_path / "orbax", layers=[1])
    store = open_store(tmp_path / "orbax")
    sources = read_sources(store)
    assert sources.tensors["layers.0.attn.wq_a.weight"].dropped == "belongs to a layer that was not asked for"
    assert sources.tensors["mtp.0.e_proj.weight"].dropped == "belongs to a layer that was not asked for"
    assert sources.tensors["layers.1.attn.wq_a.weight"].targets == ("layers.1.attn.wq_a",)
    assert store.metadata["tensors"]["dropped"]["belongs to a layer that was not asked for"] > 100
    assert compare_with_source(store, tiny) == []


@pytest.mark.parametrize("storage", Storage)
def test_a_changed_source_is_named(
    tiny: Path, converted: dict[Storage, Path], tmp_path: Path, storage: Storage
) -> None:
    shutil.copytree(tiny, tmp_path / "hf")
    name = "layers.2.ffn.experts.3.w2.weight"
    with open_checkpoint(tmp_path / "hf") as checkpoint:
        info = checkpoint.tensors[name]
    flip(info.file, info.start + 5)
    (problem,) = compare_with_source(open_store(converted[storage]), tmp_path / "hf")
    path = "layers.2.ffn.experts.w2" + (".weight" if storage is Storage.SOURCE else "")
    assert problem.startswith(f"{path}, chunk (3, 0, 0): 1 of ")
    assert f"{name} in {info.file} is not the tensor that was converted" in problem


@pytest.mark.parametrize("storage", Storage)
def test_a_changed_store_is_named(tiny: Path, converted: dict[Storage, Path], tmp_path: Path, storage: Storage) -> None:
    shutil.copytree(converted[storage], tmp_path / "orbax")
    path = "layers.1.attn.wq_b" + (".weight" if storage is Storage.SOURCE else "")
    flip(tmp_path / "orbax" / path / "0.0", 9)
    store = open_store(tmp_path / "orbax")
    (problem,) = compare_with_source(store, tiny)
    assert problem.startswith(f"{path}, chunk (0, 0): 1 of ")
    assert problem.endswith("the stored bytes have changed since")
    assert "layers.1.attn.wq_b.weight" in problem
    assert len(verify(store)) == 1


def test_another_model_is_refused(converted: dict[Storage, Path], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "other", tiny_config(hidden_size=64))
    (problem,) = compare_with_source(open_store(converted[Storage.BFLOAT16]), tmp_path / "other")
    assert "another architecture" in problem
    with pytest.raises(BadInput, match="no such folder"):
        compare_with_source(open_store(converted[Storage.BFLOAT16]), tmp_path / "absent")


def test_other_weights_of_the_same_shapes_differ_everywhere(converted: dict[Storage, Path], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "other", tiny_config(), seed=99)
    store = open_store(converted[Storage.BFLOAT16])
    problems = compare_with_source(store, tmp_path / "other")
    assert {problem.split(",")[0] for problem in problems} == set(store.paths)


def test_a_damaged_account_is_noticed(converted: dict[Storage, Path], tmp_path: Path) -> None:
    shutil.copytree(converted[Storage.BFLOAT16], tmp_path / "orbax")
    flip(tmp_path / "orbax" / SOURCES_FILE, 500)
    with pytest.raises(BadInput, match=r"dsv4_sources\.json: changed or damaged"):
        read_sources(open_store(tmp_path / "orbax"))
