"""Which weights a checkpoint holds: the same digests in every dialect and storage, others for other values."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import dsv4_convert.golden as golden_package
from dsv4_convert.convert import Storage, hf_to_orbax
from dsv4_convert.convert.to_hf import orbax_to_hf
from dsv4_convert.golden.archive import open_golden
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.spec.names import parameters
from dsv4_convert.weights.converted import Weights
from dsv4_convert.weights.published import PublishedWeights
from dsv4_convert.weights.values import differing_values, value_digests

LAYERS = (2, 3)


@pytest.mark.parametrize("form", ["fp4", "fp8"])
def test_every_storage_and_the_way_back_have_the_digests_of_the_release(tmp_path: Path, form: str) -> None:
    """In FP8 with float32 scales values are rounded to bfloat16, once or twice."""
    write_checkpoint(tmp_path / "hf", tiny_config(), seed=1, form=form)  # type: ignore[arg-type]
    published = PublishedWeights.open(tmp_path / "hf")
    recorded = value_digests(published, LAYERS)
    assert list(recorded) == [path for path, _, _ in parameters(published.config, LAYERS)]
    for storage in Storage:
        hf_to_orbax(tmp_path / "hf", tmp_path / storage, storage=storage, layers=LAYERS)
        assert not differing_values(Weights.open(tmp_path / storage), recorded, LAYERS), storage
    hf_to_orbax(tmp_path / "hf", tmp_path / "whole", storage=Storage.BFLOAT16)
    orbax_to_hf(tmp_path / "whole", tmp_path / "copy")
    copy = PublishedWeights.open(tmp_path / "copy")
    assert value_digests(copy, LAYERS) == recorded, "another dialect of the same values"


def test_another_value_another_order_and_another_shape_are_seen(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config(), seed=1)
    published = PublishedWeights.open(tmp_path / "hf")
    recorded = value_digests(published, [1])
    write_checkpoint(tmp_path / "other", tiny_config(), seed=2)
    others = differing_values(PublishedWeights.open(tmp_path / "other"), recorded, [1])
    assert set(others) == set(recorded)
    assert others == tuple(path for path in recorded if path in others)
    for path in ("layers.1.attn.wo_a", "layers.1.ffn.experts.w2", "layers.1.attn_norm", "layers.1.ffn.gate.tid2eid"):
        changed = _Changed(published, path)
        assert differing_values(changed, recorded, [1]) == (path,)


def test_the_committed_golden_knows_its_weights(tmp_path: Path) -> None:
    golden = open_golden(Path(golden_package.__file__).parent / "data" / "tiny")
    recorded = golden.manifest.request.source.values
    assert set(recorded) == {path for path, _, _ in parameters(golden.config, golden.layers)}
    for seed, same in ((0, True), (1, False)):
        write_checkpoint(tmp_path / str(seed), tiny_config(), seed=seed)
        weights = PublishedWeights.open(tmp_path / str(seed))
        assert set(differing_values(weights, recorded, golden.layers)) == (set() if same else set(recorded))


class _Changed(PublishedWeights):
    """One parameter in reverse order."""

    def __init__(self, weights: PublishedWeights, path: str) -> None:
        self.__dict__ |= weights.__dict__
        self._path = path

    def read_region(self, path: str, region: tuple[slice, ...], dtype: object = np.float32) -> np.ndarray:  # type: ignore[type-arg,override]
        if path != self._path:
            return super().read_region(path, region, np.dtype(dtype))  # type: ignore[call-overload]
        return np.flip(self.read(path, np.dtype(ml_dtypes.bfloat16)))[region]
