"""Parameters straight from the published shards are those of the converted checkpoint, bit by bit, in every dialect."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsv4_convert.convert import Storage, hf_to_orbax
from dsv4_convert.converted import Weights
from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.golden.synthetic import Form, tiny_config, write_checkpoint
from dsv4_convert.names import parameters
from dsv4_convert.published import PublishedWeights

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)


@pytest.mark.parametrize("form", ["fp4", "fp8", "bf16"])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_equal_to_the_converted_checkpoint(tmp_path: Path, form: Form, dtype: np.dtype) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config(), seed=3, form=form)
    hf_to_orbax(tmp_path / "hf", tmp_path / "orbax", storage=Storage.SOURCE)
    ours, stored = PublishedWeights.open(tmp_path / "hf"), Weights.open(tmp_path / "orbax")
    assert ours.config == stored.config
    for path, rule, _ in parameters(ours.config):
        a, b = ours.read(path, dtype), stored.read(path, dtype)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes(), path
        if rule.per_expert:
            assert ours.read_expert(path, 4, dtype).tobytes() == stored.read_expert(path, 4, dtype).tobytes()
    rows = np.array([95, 0, 7])
    assert ours.read_rows("embed", rows, dtype).tobytes() == stored.read_rows("embed", rows, dtype).tobytes()
    hf_to_orbax(tmp_path / "hf", tmp_path / "wide", storage=Storage.FLOAT32)
    random = np.random.default_rng(0)
    for side in (ours, stored, Weights.open(tmp_path / "wide")):
        for path, _, _ in parameters(ours.config):
            whole = side.read(path, dtype)
            for _ in range(3):
                bounds = [sorted(random.choice(size + 1, 2, replace=False)) for size in whole.shape]
                region = tuple(slice(int(start), int(stop)) for start, stop in bounds)
                part = side.read_region(path, region, dtype)
                assert part.dtype == whole.dtype
                assert part.tobytes() == np.ascontiguousarray(whole[region]).tobytes(), (path, region)


def test_some_layers_only(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config(), seed=3, layers=[1])
    with pytest.raises(BadInput):
        PublishedWeights.open(tmp_path / "hf")
    part = PublishedWeights.open(tmp_path / "hf", layers=(1,))
    assert part.read("layers.1.attn_norm").shape == (32,)
    with pytest.raises(UsageError, match=r"opened without the layers \[0\]"):
        part.check_layers((0, 1))
    with pytest.raises(BadInput, match=r"nothing fills layers\.0\.attn_norm"):
        part.read("layers.0.attn_norm")
