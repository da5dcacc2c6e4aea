"""DeepSeek-V4.1's model against itself: a prompt in parts, scanned layers, its taps and parameters."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from dsv4_convert.golden.synthetic import random_v41_architecture, tiny_v41_config, write_checkpoint
from dsv4_convert.model import Cache, Taps
from dsv4_convert.model.architectures import model_of
from dsv4_convert.model.ops import Derived
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import Section, parameters
from dsv4_convert.spec.taps import TapKey, taps_of
from dsv4_convert.weights.published import PublishedWeights
from dsv4_convert.weights.restore import restore_model

TOKENS, CAPACITY = 41, 48


class Small:
    """The small model with random weights, its functions compiled once, and two prompts."""

    def __init__(self, folder: Path, *, scanned: bool) -> None:
        model = restore_model(PublishedWeights.open(folder), scanned=scanned)
        self.config = model.config
        self._graph, self._state = nnx.split(model)
        self.scanned = scanned
        self.tokens = np.random.default_rng(0).integers(0, self.config.vocab_size, (2, TOKENS)).astype(np.int32)
        # Weights are arguments: as constants of a program they take longer to compile.
        self.extend = partial(jax.jit(self._extend), self._state)
        self.whole = partial(jax.jit(self._whole), self._state)
        self.logits, self.taps = self.whole(self.tokens)

    def _extend(self, state: Any, tokens: Any, cache: Cache, count: Any, keep: Any) -> tuple[Any, Cache]:
        return nnx.merge(self._graph, state).extend(tokens, cache, count=count, keep=keep)

    def _whole(self, state: Any, tokens: Any) -> tuple[Any, dict[str, Any]]:
        taps = Taps(lambda _: True)
        logits = nnx.merge(self._graph, state)(tokens, taps=taps)
        self.order = list(taps.values)
        return logits, taps.values

    def empty(self) -> Cache:
        return Cache.empty(self.config, 2, CAPACITY, scanned=self.scanned)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with every kind of layer."""
    folder = tmp_path_factory.mktemp("v41") / "hf"
    write_checkpoint(folder, tiny_v41_config(sliding_window=6), seed=0)
    return folder


@pytest.fixture(scope="module")
def small(folder: Path) -> Small:
    return Small(folder, scanned=False)


def _parts(small: Small, counts: np.ndarray, forgotten: np.ndarray) -> None:
    """Gives either prompt its own number of tokens per step, padded to 8; ``forgotten`` more are not kept."""
    rng = np.random.default_rng(len(counts))
    cache, start = small.empty(), np.zeros(2, int)
    for step, more in zip(counts, forgotten, strict=True):
        keep = np.minimum(step, TOKENS - start).astype(np.int32)
        fed = rng.integers(0, small.config.vocab_size, (2, 8)).astype(np.int32)
        for row in range(2):
            fed[row, : keep[row]] = small.tokens[row, start[row] : start[row] + keep[row]]
        found, cache = small.extend(fed, cache, np.minimum(keep + more, 8).astype(np.int32), keep)
        for row in range(2):
            expected = small.logits[row, start[row] : start[row] + keep[row]]
            np.testing.assert_allclose(found[row, : keep[row]], expected, atol=2e-5, rtol=1e-5)
        start += keep
    assert cache.tokens.tolist() == start.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_any_split_gives_the_logits_of_the_whole_prompt(small: Small, seed: int) -> None:
    """Unequal prompts, padding and tokens that are forgotten again; the last split is one token at a time."""
    rng = np.random.default_rng(seed)
    steps = np.ones((TOKENS, 2), int) if seed == 3 else rng.integers(0, 8, (14, 2))
    _parts(small, steps, rng.integers(0, 3, steps.shape) if seed else np.zeros_like(steps))


def test_tokens_beyond_the_capacity_are_nan(small: Small) -> None:
    cache, count = small.empty(), np.array([8, 7], np.int32)
    for _ in range(6):
        found, cache = small.extend(small.tokens[:, :8], cache, count, count)
    assert not np.isnan(found).any()
    found, _ = small.extend(small.tokens[:, :8], cache, count, count)
    assert np.isnan(found[0]).all()
    assert np.isnan(found[1]).any(axis=1).tolist() == [False] * 6 + [True, False]


@pytest.mark.thorough
def test_scanned_layers_are_the_same_model(small: Small, folder: Path) -> None:
    scanned = Small(folder, scanned=True)
    for name, value in small.taps.items():
        np.testing.assert_allclose(scanned.taps[name], value, atol=2e-5, rtol=1e-5, err_msg=name)
    rng = np.random.default_rng(5)
    _parts(scanned, rng.integers(0, 8, (14, 2)), np.zeros((14, 2), int))


def test_every_tap_is_recorded_in_the_shape_and_order_of_its_table(small: Small) -> None:
    layers = range(small.config.num_hidden_layers)
    before, *after = [[str(TapKey(None, tap))] for tap in taps_of(small.config, None)]
    inside = [str(TapKey(layer, tap)) for layer in layers for tap in taps_of(small.config, layer)]
    assert small.order == [*before, *inside, *(name for names in after for name in names)]
    for name, value in small.taps.items():
        assert value.ndim == len(TapKey.parse(name).tap.shape.split()), name


@pytest.mark.parametrize("seed", range(6))
def test_parameters_are_those_of_the_names_table(seed: int) -> None:
    """The text model's and the draft stages', and not the router's bias for images. No row has the token map."""
    config = Config.from_hf(random_v41_architecture(seed))
    state = nnx.state(nnx.eval_shape(lambda: model_of(config)))
    found = {
        ".".join(map(str, key)): variable.shape
        for key, variable in nnx.to_flat_state(state)
        if not isinstance(variable, Derived)
    }
    expected = {
        path: rule.target_shape(config, layer)
        for path, rule, layer in parameters(config)
        if rule.section is not Section.VISION and not path.endswith("bias_vl")
    }
    assert found == expected


def test_no_token_sees_its_future(small: Small) -> None:
    changed = small.tokens.copy()
    changed[:, 30:] = (changed[:, 30:] + 1) % small.config.vocab_size
    other, _ = small.whole(changed)
    np.testing.assert_allclose(small.logits[:, :30], other[:, :30], rtol=0, atol=1e-5)
    assert np.abs(np.asarray(small.logits)[:, 30:] - np.asarray(other)[:, 30:]).max(axis=-1).min() > 1e-3
