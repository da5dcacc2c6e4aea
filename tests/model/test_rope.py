"""Rotary tables against transformers' own, and the rotation against complex numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_convert.model.rope import frequencies, rotate
from dsv4_convert.spec.config import Config


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    from dsv4_convert.golden.synthetic import tiny_config

    return tiny_config()


def _reference(raw: dict[str, Any], label: str) -> np.ndarray:
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

    return getattr(DeepseekV4RotaryEmbedding(DeepseekV4Config(**raw)), f"{label}_inv_freq").numpy()


@pytest.mark.parametrize("original", [64, 4096, 65536])
@pytest.mark.parametrize("width", [2, 8, 16, 64])
def test_tables_equal_transformers_bit_for_bit(raw: dict[str, Any], width: int, original: int) -> None:
    raw = {**raw, "qk_rope_head_dim": width, "head_dim": 128, "index_head_dim": 64}
    raw["rope_scaling"] = {**raw["rope_scaling"], "original_max_position_embeddings": original}
    config = Config.from_hf(raw)
    for compressed, label in ((False, "main"), (True, "compress")):
        assert np.array_equal(frequencies(config, compressed=compressed), _reference(raw, label))


def test_the_two_tables_differ_and_yarn_shows(raw: dict[str, Any]) -> None:
    config = Config.from_hf({**raw, "qk_rope_head_dim": 16, "index_head_dim": 16})
    plain = dataclasses.replace(config, yarn=None)
    assert not np.array_equal(frequencies(config, compressed=False), frequencies(config, compressed=True))
    assert not np.array_equal(frequencies(config, compressed=True), frequencies(plain, compressed=True))
    assert np.array_equal(frequencies(config, compressed=False), frequencies(plain, compressed=False))


def test_rotation_is_multiplication_by_a_complex_number_in_the_last_channels() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 10)).astype(np.float32)
    positions = rng.integers(0, 100, size=(2, 5)).astype(np.int32)
    table = np.array([1.0, 0.3, 0.01], np.float32)
    rotated = np.asarray(rotate(jnp.asarray(x), jnp.asarray(positions), table))
    pairs = x[..., 4:].astype(np.float64)
    numbers = pairs[..., 0::2] + 1j * pairs[..., 1::2]
    expected = numbers * np.exp(1j * positions[:, :, None, None] * table.astype(np.float64))
    assert np.array_equal(rotated[..., :4], x[..., :4])
    np.testing.assert_allclose(rotated[..., 4::2], expected.real, atol=1e-5)
    np.testing.assert_allclose(rotated[..., 5::2], expected.imag, atol=1e-5)


def test_inverse_undoes() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 7, 2, 8)), jnp.float32)
    positions, table = jnp.arange(7)[None] * 11, np.array([1.0, 0.1], np.float32)
    back = rotate(rotate(x, positions, table), positions, table, inverse=True)
    np.testing.assert_allclose(back, x, atol=1e-6)
    assert not np.allclose(rotate(x, positions, table), x, atol=1e-2)


@pytest.mark.parametrize("yarn", [True, False], ids=["yarn", "plain"])
@pytest.mark.parametrize("compressed", [False, True])
def test_far_positions_turn_by_the_last_bit(compressed: bool, yarn: bool) -> None:
    """V4-Flash's tables up to its last position: cos and sin are one of the two float32 next to the float64 value.

    The angle is the float32 product, which is the model's definition: at a million it is a sixteenth of a radian apart
    from its neighbour.
    """
    config = Config.from_file(Path(__file__).parent.parent / "data" / "configs" / "DeepSeek-V4-Flash.json")
    table = frequencies(config if yarn else dataclasses.replace(config, yarn=None), compressed=compressed)
    rng = np.random.default_rng(0)
    edges = [np.arange(middle - 300, middle + 300) for middle in (65_536, 131_072, 524_288, 1_000_000)]
    last = 1 << 20
    assert config.max_position_embeddings == last
    positions = np.concatenate([np.arange(2000), *edges, rng.integers(0, last, 4000), np.arange(last - 2000, last)])
    one = np.zeros((1, len(positions), 2 * len(table)), np.float32)
    one[..., 0::2] = 1
    rotated = np.asarray(jax.jit(lambda x, at: rotate(x, at, table))(one, positions[None].astype(np.int32)))[0]
    angles = (positions[:, None].astype(np.float32) * table).astype(np.float64)
    for found, exact in ((rotated[:, 0::2], np.cos(angles)), (rotated[:, 1::2], np.sin(angles))):
        assert (np.abs(found - exact) < np.spacing(np.abs(exact).astype(np.float32))).all()
