"""A converted model straight into a mesh: the numbers of the plain restore, every process reading its ranges only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsv4_convert.convert import Storage, hf_to_orbax
from dsv4_convert.golden.synthetic import tiny_config, tiny_v41_config, write_checkpoint

from ..processes import end, start, together


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in every storage. Shards cut the tiles of FP8 and the groups of FP4, and layers repeat."""
    folder = tmp_path_factory.mktemp("converted")
    raw: dict[str, Any] = tiny_config(
        hidden_size=192, moe_intermediate_size=96, num_hidden_layers=6, compress_ratios=[0, 4, 128, 4, 128, 4, 0]
    )
    write_checkpoint(folder / "hf", raw, seed=1)
    for storage in Storage:
        hf_to_orbax(folder / "hf", folder / storage, storage=storage)
    return folder


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose blocks of codes a mesh does not cut; two layers are of one kind."""
    folder = tmp_path_factory.mktemp("codes")
    widths = dict.fromkeys(("hidden_size", "moe_intermediate_size", "q_lora_rank", "o_lora_rank"), 256)
    layers = {"num_hidden_layers": 3, "num_hash_layers": 0, "compress_ratios": [4, 4, 128, 0]}
    raw = tiny_config(**widths, **layers, num_attention_heads=4, head_dim=128, index_head_dim=32, n_routed_experts=4)
    write_checkpoint(folder / "hf", raw, seed=1)
    hf_to_orbax(folder / "hf", folder / "orbax", storage=Storage.SOURCE)
    return folder / "orbax"


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A V4.1 whose tables are larger than the rest, and whose blocks of codes a mesh does not cut."""
    folder = tmp_path_factory.mktemp("tables")
    widths = dict.fromkeys(("moe_intermediate_size", "q_lora_rank"), 64)
    raw = tiny_v41_config(**widths, num_attention_heads=4, o_lora_rank=32, engram_vocab_size=5000)
    write_checkpoint(folder / "hf", raw, seed=1)
    hf_to_orbax(folder / "hf", folder / "orbax", storage=Storage.SOURCE)
    return folder / "orbax"


def test_tables_on_eight_devices(tables: Path) -> None:
    ended = end(start(["-m", "tests.weights.sharded", "tables", str(tables)], devices=8))
    assert ended.code == 0, ended.err


def test_two_processes_read_their_own_rows(tables: Path) -> None:
    ended = together(["-m", "tests.weights.sharded", "own_codes", str(tables)], 2, devices=2)
    assert [process.code for process in ended] == [0, 0], ended


def test_codes_on_eight_devices(codes: Path) -> None:
    ended = end(start(["-m", "tests.weights.sharded", "codes", str(codes)], devices=8))
    assert ended.code == 0, ended.err


def test_two_processes_read_their_own_codes(codes: Path) -> None:
    ended = together(["-m", "tests.weights.sharded", "own_codes", str(codes)], 2, devices=2)
    assert [process.code for process in ended] == [0, 0], ended


def test_every_leaf_on_eight_devices(converted: Path) -> None:
    ended = end(start(["-m", "tests.weights.sharded", "every_leaf", str(converted)], devices=8))
    assert ended.code == 0, ended.err


def test_ranges_are_read_at_once_within_a_budget(tmp_path: Path) -> None:
    ended = end(start(["-m", "tests.weights.sharded", "at_once", str(tmp_path)], devices=8))
    assert ended.code == 0, ended.err


def test_two_processes_read_their_own_ranges(converted: Path) -> None:
    ended = together(["-m", "tests.weights.sharded", "own_ranges", str(converted / "bfloat16")], 2, devices=2)
    assert [process.code for process in ended] == [0, 0], ended
