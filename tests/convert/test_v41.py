"""Conversion of DeepSeek-V4.1: tiles of 32, n-gram tables in chunks of rows, and the way back, against torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dsv4_convert.checkpoint.locate import open_source
from dsv4_convert.convert import Advance, Layout, Storage, hf_to_orbax
from dsv4_convert.convert.against import compare_with_source
from dsv4_convert.convert.plan import plan
from dsv4_convert.convert.to_hf import orbax_to_hf
from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.golden.synthetic import tiny_v41_config, write_checkpoint
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import Kind, Rule, Transform, parameters
from dsv4_convert.store import open_store, verify
from dsv4_convert.store.arrays import StoredArray
from dsv4_convert.weights.converted import Weights
from dsv4_convert.weights.published import PublishedWeights

from ..test_releases import DATA, headers_of

#: Small enough that everything is cut where it can be: a table has 304 or 462 rows, which are cut by 128.
CHUNK_BYTES = 512
TABLES = ("layers.1.engram.embed", "layers.4.engram.embed")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        assert plan.__kwdefaults__ is not None
        patch.setitem(plan.__kwdefaults__, "chunk_bytes", CHUNK_BYTES)
        yield


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v41") / "hf"
    write_checkpoint(folder, tiny_v41_config())
    return folder


@pytest.fixture(scope="module")
def published(hf: Path) -> Tensors:
    return tensors_of(hf)


@pytest.fixture(scope="module", params=list(Storage), ids=lambda storage: storage.value)
def converted(request: pytest.FixtureRequest, hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v41") / "orbax"
    planned, _ = hf_to_orbax(hf, folder, storage=request.param)
    assert not planned.dropped
    return folder


def tensors_of(folder: Path) -> Tensors:
    """All tensors of a folder, as the safetensors package reads them."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def decoded(published: Tensors, name: str, tile: tuple[int, int]) -> torch.Tensor:
    """A weight in float32, by torch's own dtypes: E8M0 scales, E4M3 codes, and two E2M1 codes in a byte."""
    weight = published[f"{name}.weight"]
    if f"{name}.scale" not in published:
        return weight.float()
    if weight.dtype == torch.int8:
        magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        table, codes = torch.cat([magnitudes, -magnitudes]), weight.view(torch.uint8).long()
        values = torch.stack([table[codes & 15], table[codes >> 4]], dim=-1).flatten(-2)
    else:
        assert weight.dtype == torch.float8_e4m3fn
        values = weight.float()
    scale = published[f"{name}.scale"]
    assert scale.dtype == torch.float8_e8m0fnu
    spread = scale.float().repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
    return values * spread[: values.shape[0], : values.shape[1]]


def of_torch(published: Tensors, config: Config, rule: Rule, layer: int | None) -> np.ndarray[Any, Any]:
    """A parameter as the model has it."""

    def one(expert: int | None) -> torch.Tensor:
        name = rule.published.format(*rule.numbers(config, layer, expert))
        if rule.kind not in (Kind.LINEAR, Kind.EXPERT):
            return published[name].float()
        tile = (1, 32) if rule.kind is Kind.EXPERT or name.endswith("engram.embed.weight") else (32, 32)
        return decoded(published, name.removesuffix(".weight"), tile)

    if rule.per_expert:
        return torch.stack([one(expert).T for expert in range(config.experts_of(layer))]).numpy()
    value = one(None)
    if rule.transform is Transform.GROUPED:
        return value.reshape(config.o_groups, -1, value.shape[1]).transpose(1, 2).numpy()
    return (value.T if rule.transform is Transform.TRANSPOSE else value).numpy()


def test_every_parameter_is_what_torch_decodes(hf: Path, published: Tensors, converted: Path) -> None:
    weights, source = Weights.open(converted), PublishedWeights.open(hf)
    for path, rule, layer in parameters(weights.config):
        expected = of_torch(published, weights.config, rule, layer)
        for reader in (weights, source):
            assert np.array_equal(reader.read(path), expected), path
        some = tuple(slice(size // 3, size - size // 4) for size in expected.shape)
        assert np.array_equal(weights.read_region(path, some), expected[some]), path


def test_tables_are_cut_by_rows_and_looked_up_by_rows(
    hf: Path, published: Tensors, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(converted)
    source = store.conversion.storage is Storage.SOURCE
    read: list[int] = []
    of_array = StoredArray.read_region

    def counted(self: StoredArray, region: Any) -> np.ndarray[Any, Any]:
        part = of_array(self, region)
        read.append(part.shape[0])
        return part

    monkeypatch.setattr(StoredArray, "read_region", counted)
    for path in TABLES:
        leaves = (f"{path}.weight", f"{path}.scale") if source else (path,)
        assert all(store.leaf(leaf).chunk_count >= 2 for leaf in leaves)
        table = decoded(published, path, (1, 32)).numpy()
        wanted = np.array([[0, len(table) - 1], [7, 7], [128, 127]])
        read.clear()
        for reader in (Weights.open(converted), PublishedWeights.open(hf)):
            found = reader.read_rows(path, wanted)
            assert np.array_equal(found, table[wanted])
        assert sum(read) == 5 * len(leaves)  # five distinct rows, and nothing else
        in_bfloat16 = reader.read_rows(path, wanted, np.dtype(ml_dtypes.bfloat16))
        assert np.array_equal(in_bfloat16, table[wanted].astype(ml_dtypes.bfloat16))


def test_verified_and_compared_with_its_source(hf: Path, converted: Path) -> None:
    store = open_store(converted)
    assert not verify(store)
    assert not compare_with_source(store, hf)


def test_the_published_bytes_come_back(hf: Path, converted: Path, tmp_path: Path) -> None:
    """From ``source`` every tensor of every part, in its own shard; from decoded weights the same numbers."""
    source = open_store(converted).conversion.storage is Storage.SOURCE
    summary = orbax_to_hf(converted, tmp_path / "hf", requantize=not source)
    assert not summary.changed
    assert not summary.left_out
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (hf / name).read_bytes()
    again, before = (
        {file.name: load_file(file) for file in folder.glob("*.safetensors")} for folder in (tmp_path / "hf", hf)
    )
    assert again.keys() == before.keys()
    for shard, tensors in before.items():
        assert again[shard].keys() == tensors.keys()
        if not source:
            continue
        for name, tensor in tensors.items():
            assert again[shard][name].dtype == tensor.dtype
            assert torch.equal(again[shard][name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_an_interrupted_conversion_is_resumed(hf: Path, converted: Path, tmp_path: Path) -> None:
    storage = open_store(converted).conversion.storage

    def stop(advance: Advance) -> None:
        if advance.written > advance.to_write / 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf_to_orbax(hf, tmp_path / "orbax", storage=storage, progress=stop)
    assert not (tmp_path / "orbax").exists()
    hf_to_orbax(hf, tmp_path / "orbax", storage=storage)
    digests = [open_store(folder).manifest.leaves for folder in (tmp_path / "orbax", converted)]
    assert digests[0] == digests[1]


def test_some_layers_bring_their_tables_and_neither_drafts_nor_vision(hf: Path, tmp_path: Path) -> None:
    planned, _ = hf_to_orbax(hf, tmp_path / "orbax", storage=Storage.SOURCE, layers=[1, 2])
    weights = Weights.open(tmp_path / "orbax")
    assert weights.layers == (1, 2)
    assert weights.read_rows(TABLES[0], np.arange(3)).shape == (3, 64)
    paths = open_store(tmp_path / "orbax").paths
    assert not any(path.startswith(("mtp", "vision", "aligner", "layers.3")) for path in paths)
    assert len(planned.dropped) + planned.tensors == len(tensors_of(hf))


def test_a_damaged_row_of_a_table_is_found(hf: Path, tmp_path: Path) -> None:
    hf_to_orbax(hf, tmp_path / "orbax", storage=Storage.SOURCE)
    files = [file for file in (tmp_path / "orbax" / f"{TABLES[1]}.weight").rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[100] ^= 4
    largest.write_bytes(data)
    (problem,) = verify(open_store(tmp_path / "orbax"))
    assert TABLES[1] in str(problem)


@pytest.mark.parametrize("storage", [Storage.BFLOAT16, Storage.SOURCE])
@pytest.mark.parametrize(
    ("part", "byte", "problem"),
    [("scale", 0xFF, r"the scale at \[300, 1\] is NaN"), ("weight", 0x7F, r"the code at \[300, 1\] is NaN")],
)
def test_a_value_that_no_table_holds_is_refused_with_its_row(
    hf: Path, tmp_path: Path, storage: Storage, part: str, byte: int, problem: str
) -> None:
    """Its row is that of the table, not of the chunk."""
    shutil.copytree(hf, tmp_path / "hf")
    name = f"{TABLES[0]}.{part}"
    with open_source(hf) as checkpoint:
        info = checkpoint.tensors[name]
    data = bytearray((tmp_path / "hf" / info.file.name).read_bytes())
    data[info.start + 300 * info.shape[1] + 1] = byte
    (tmp_path / "hf" / info.file.name).write_bytes(data)
    with pytest.raises(BadInput, match=rf"{TABLES[0]}\S*: {problem}"):
        hf_to_orbax(tmp_path / "hf", tmp_path / "orbax", storage=storage)
    assert not (tmp_path / "orbax").exists()


def test_maxtext_has_no_such_model(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"MaxText 0\.2\.5 has no DeepSeek-V4\.1; use --layout dsv4"):
        hf_to_orbax(hf, tmp_path / "orbax", layout=Layout.MAXTEXT)


def test_a_whole_release_fits_the_memory_that_is_allowed() -> None:
    """No chunk of the two tables of 98 GB, or of anything else, is larger than the default says."""
    headers, _ = headers_of("DeepSeek-V4.1-Flash")
    config = Config.from_file(DATA / "configs" / "DeepSeek-V4.1-Flash.from_third_party_test.json")
    planned = plan(headers, config, Storage.FLOAT32, chunk_bytes=64 << 20)
    assert max(leaf.layout.chunk_nbytes for leaf in planned.stored_leaves) <= 64 << 20
    assert planned.workers(1 << 30, 2) == 2
