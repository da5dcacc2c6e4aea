"""The model's parameters are exactly those of the names table, and recording never changes a result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import TypeCheckError

from dsv4_convert.model import Model, Taps
from dsv4_convert.model.ops import linear
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import parameters
from dsv4_convert.spec.taps import TapKey, taps_of

from .weights import random_model


def _configs() -> list[Config]:
    from dsv4_convert.golden.synthetic import random_architecture, tiny_config

    return [Config.from_hf(raw) for raw in (tiny_config(), *(random_architecture(seed) for seed in range(6)))]


@pytest.mark.parametrize("config", _configs(), ids=lambda config: f"hidden{config.hidden_size}")
def test_parameters_are_those_of_the_names_table(config: Config) -> None:
    _, state = nnx.split(nnx.eval_shape(lambda: Model(config)))
    found = {".".join(map(str, key)): variable.shape for key, variable in nnx.to_flat_state(state)}
    assert found == {path: rule.target_shape(config, layer) for path, rule, layer in parameters(config)}


@pytest.fixture(scope="module")
def model() -> tuple[Config, Callable[..., jax.Array]]:
    """A small model with random weights, as a jitted function of (tokens, taps wanted)."""
    from dsv4_convert.golden.synthetic import tiny_config

    config = Config.from_hf(tiny_config())
    graph, weights = random_model(config)

    def run(weights: nnx.State, tokens: jax.Array, *, record: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        taps = Taps((lambda _: True) if record else None)
        return nnx.merge(graph, weights)(tokens, taps=taps), taps.values

    return config, partial(jax.jit(run, static_argnames="record"), weights)


@pytest.mark.parametrize("tokens", [1, pytest.param(4, marks=pytest.mark.thorough), 130])
def test_recording_changes_no_bit_and_records_every_tap(model, tokens: int) -> None:
    config, run = model
    ids = jnp.asarray(np.random.default_rng(tokens).integers(0, config.vocab_size, (2, tokens)), jnp.int32)
    bare, nothing = run(ids, record=False)
    recorded, taps = run(ids, record=True)
    assert np.isfinite(bare).all()
    assert np.array_equal(bare, recorded)
    assert not nothing
    layers = [None, *range(config.num_hidden_layers)]
    assert set(taps) == {str(TapKey(layer, tap)) for layer in layers for tap in taps_of(config, layer)}


def test_taps_come_with_the_shapes_that_their_table_says(model) -> None:
    config, run = model
    _, taps = run(jnp.zeros((2, 130), jnp.int32), record=True)
    for layer in (None, *range(config.num_hidden_layers)):
        for tap in taps_of(config, layer):
            assert taps[str(TapKey(layer, tap))].ndim == len(tap.shape.split()), tap.name


def test_an_override_is_followed_and_the_own_value_recorded() -> None:
    taps = Taps(lambda _: True, {"layers.0.attn.q": jnp.ones(3)})
    followed = taps.within("layers.0.").within("attn.")("q", jnp.zeros(3))
    assert followed.tolist() == [1, 1, 1]
    assert taps.values["layers.0.attn.q"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="the override has shape"):
        taps.within("layers.0.attn.")("q", jnp.zeros(4))


def test_a_batch_is_its_rows(model) -> None:
    config, run = model
    ids = jnp.asarray(np.random.default_rng(5).integers(0, config.vocab_size, (2, 130)), jnp.int32)
    together, _ = run(ids, record=False)
    for row in range(2):
        twice, _ = run(ids[jnp.array([row, row])], record=False)
        np.testing.assert_allclose(twice, together[jnp.array([row, row])], atol=2e-5)


def test_no_token_sees_its_future(model) -> None:
    config, run = model
    ids = np.random.default_rng(6).integers(0, config.vocab_size, (2, 130)).astype(np.int32)
    whole, _ = run(jnp.asarray(ids), record=False)
    changed = ids.copy()
    changed[:, 100:] = (changed[:, 100:] + 1) % config.vocab_size
    other, _ = run(jnp.asarray(changed), record=False)
    # Not bit-equal: how rows are packed for the experts depends on the routing of all tokens, and with it the rounding.
    np.testing.assert_allclose(whole[:, :100], other[:, :100], rtol=0, atol=1e-6)
    assert np.abs(np.asarray(whole)[:, 100:] - np.asarray(other)[:, 100:]).max(axis=-1).min() > 1e-2


def test_the_shapes_of_every_call_are_checked() -> None:
    """By the option of pytest that pyproject.toml sets."""
    with pytest.raises(TypeCheckError, match="inner"):
        linear(jnp.ones((2, 3)), jnp.ones((4, 5)))
