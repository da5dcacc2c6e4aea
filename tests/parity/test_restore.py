"""The restored model as one program: logits against the golden, from every storage, as the README shows it."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv4_convert import Storage, Weights, hf_to_orbax, restore_model
from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.golden.archive import open_golden


@pytest.mark.parametrize("storage", Storage)
def test_the_whole_model_from_every_storage(tiny: Path, golden: Path, tmp_path: Path, storage: Storage) -> None:
    hf_to_orbax(tiny, tmp_path / "orbax", storage=storage)
    model = restore_model(Weights.open(tmp_path / "orbax"))
    recorded = open_golden(golden)
    logits = jax.jit(model)(jnp.asarray(recorded.tokens))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, recorded.read("logits"), atol=1e-4, rtol=1e-4)


def test_activations_in_bfloat16_stay_near(tiny: Path, golden: Path, tmp_path: Path) -> None:
    """Only the dtype of the activations changes; float32 parts of the model keep the logits in place."""
    hf_to_orbax(tiny, tmp_path / "orbax")
    model = restore_model(Weights.open(tmp_path / "orbax"), dtype=np.dtype(jnp.bfloat16))
    recorded = open_golden(golden)
    compiled = nnx.jit(lambda model, tokens: model(tokens, dtype=jnp.bfloat16))
    logits = np.asarray(compiled(model, jnp.asarray(recorded.tokens[:, :64])))
    expected = recorded.read("logits")[:, :64]
    cosine = (logits * expected).sum(-1) / np.linalg.norm(logits, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(cosine) > 0.99


def test_weights_read_what_is_asked_for(tiny: Path, tmp_path: Path) -> None:
    hf_to_orbax(tiny, tmp_path / "orbax", storage=Storage.FLOAT32)
    weights = Weights.open(tmp_path / "orbax")
    stack = weights.read("layers.2.ffn.experts.w1")
    assert stack.shape == (6, 32, 32)
    assert np.array_equal(weights.read_expert("layers.2.ffn.experts.w1", 4), stack[4])
    table = weights.read("embed")
    assert np.array_equal(weights.read_rows("embed", np.array([5, 0, 95])), table[[5, 0, 95]])
    assert weights.read("layers.0.ffn.gate.tid2eid").dtype == np.int32
    assert weights.layers == (0, 1, 2, 3, 4), "and the mtp stage"


def test_what_is_no_conversion_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        Weights.open(tiny)
    hf_to_orbax(tiny, tmp_path / "orbax", layers=[1])
    with pytest.raises(UsageError, match="holds the layers 1, not 0, 2-3"):
        restore_model(Weights.open(tmp_path / "orbax"))
