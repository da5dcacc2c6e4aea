"""Tables of integers: 64 bits from the source to Orbax and back, though JAX has 32 by default; and never wrapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.torch import load_file

from dsv4_convert.convert import Storage, hf_to_orbax
from dsv4_convert.convert.to_hf import orbax_to_hf
from dsv4_convert.converted import Weights
from dsv4_convert.errors import BadInput
from dsv4_convert.golden.synthetic import tiny_config
from dsv4_convert.golden.synthetic import write_checkpoint as write_source
from dsv4_convert.store import LeafSpec, Store, open_store, verify, write_checkpoint

TABLE = "layers.0.ffn.gate.tid2eid"


def test_tables_keep_their_64_bits(tmp_path: Path) -> None:
    assert jnp.asarray(np.int64([2**40])).dtype == jnp.int32 or jax.config.jax_enable_x64  # what must not happen
    changes: dict[str, Any] = {"num_hidden_layers": 1, "compress_ratios": [0], "num_hash_layers": 1}
    write_source(tmp_path / "hf", tiny_config(**changes), seed=0)
    published = _table(tmp_path / "hf")
    assert published.dtype == np.int64
    for storage in Storage:
        out = tmp_path / storage
        hf_to_orbax(tmp_path / "hf", out, storage=storage)
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(out)["layers"]["0"]["ffn"]["gate"]["tid2eid"]
        for found in (open_store(out).read(TABLE), restored):
            assert found.dtype == np.int64
            assert found.tobytes() == published.tobytes()
    orbax_to_hf(tmp_path / "source", tmp_path / "again")
    assert _table(tmp_path / "again").tobytes() == published.tobytes()


def _table(folder: Path) -> Any:
    """The published table, as safetensors itself reads it."""
    (table,) = (tensors[TABLE] for file in folder.glob("*.safetensors") if TABLE in (tensors := load_file(file)))
    return table.numpy()


def test_numbers_beyond_32_bits_survive_orbax(tmp_path: Path) -> None:
    wide = np.int64([2**31 - 1, 2**31, 2**32 + 3, -(2**40), 2**63 - 1, -(2**63)])
    leaf = LeafSpec(path="a.wide", shape=wide.shape, dtype=wide.dtype, chunk_shape=wide.shape, chunks=lambda _: wide)
    write_checkpoint(tmp_path / "out", [leaf], fingerprint={})
    assert verify(open_store(tmp_path / "out")) == []
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "out")["a"]["wide"]
    assert restored.dtype == np.int64
    assert restored.tobytes() == wide.tobytes() == (tmp_path / "out" / "a.wide" / "0").read_bytes()


@pytest.mark.parametrize("wrong", [2**32 + 1, 2**31, -1, 6])
def test_an_expert_that_is_none_is_refused_and_not_wrapped(
    wrong: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2**32 + 1 would be expert 1 in 32 bits, and XLA takes the nearest there is for one out of range."""
    changes: dict[str, Any] = {"num_hidden_layers": 1, "compress_ratios": [0], "num_hash_layers": 1}
    write_source(tmp_path / "hf", tiny_config(**changes), seed=0)
    hf_to_orbax(tmp_path / "hf", tmp_path / "out", layers=[0])
    weights = Weights.open(tmp_path / "out")
    everything = (slice(None), slice(None))
    assert weights.read(TABLE).dtype == weights.read_region(TABLE, everything).dtype == np.int32

    def planted(read: Any) -> Any:
        def other(store: Store, path: str, *rest: Any) -> Any:
            found = read(store, path, *rest)
            found.flat[7] = wrong
            return found

        return other

    monkeypatch.setattr(Store, "read", planted(Store.read))
    monkeypatch.setattr(Store, "read_region", planted(Store.read_region))
    for read in (lambda: weights.read(TABLE), lambda: weights.read_region(TABLE, everything)):
        with pytest.raises(BadInput, match=rf"tid2eid: expected experts 0 to 5, found .*{wrong}"):
            read()
