"""The model's mtp stage against one out of transformers' modules, tap by tap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv4_convert.golden.layout import token_ids
from dsv4_convert.golden.recorder import RecordingOptions, record
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.model import Model, Taps
from dsv4_convert.model.block import MTPBlock
from dsv4_convert.model.cache import LayerCache, Past, empty_stages
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.v4.kinds import AttentionKind
from dsv4_convert.weights.published import PublishedWeights
from dsv4_convert.weights.restore import restore_model

BATCH = 3
#: Below the window of 16 tokens, at it, and beyond it by more than as much.
LENGTHS = (7, 16, 45)
#: Rotary position of the first token.
FIRST = 900
#: Nothing else has a value in an order of its own: what is chosen, and with which weight.
UNORDERED = ("ffn.gate.experts", "ffn.gate.weights")


class Setting:
    """One checkpoint of random weights, and what the reference makes of its stage behind a prompt."""

    def __init__(self, folder: Path) -> None:
        write_checkpoint(folder / "hf", tiny_config(), seed=7, form="bf16")
        weights = PublishedWeights.open(folder / "hf")
        self.config: Config = weights.config
        self.model: Model = restore_model(weights, drafts=True)
        ids = np.random.default_rng(7).integers(0, self.config.vocab_size, (BATCH, LENGTHS[-1]))
        (stage,) = self.config.stage_layers
        options = RecordingOptions(tokens=ids, stages=True, layers=[stage - 1], noise=[], first_position=FIRST)
        golden = record(folder / "hf", folder / "golden", options)
        self.taps = {key.tap.name: golden.read(key) for key in golden.taps(stage)}
        positions = np.broadcast_to(FIRST + np.arange(LENGTHS[-1], dtype=np.int32), ids.shape)
        self.whole = (self.taps["streams"], token_ids(golden.tokens, self.config, stage), positions)
        self.graph, self.state = nnx.split(self.model)
        self.run = partial(jax.jit(self._run), self.state)  # as constants, weights would take long to compile

    def _run(self, state: Any, streams: Any, ids: Any, positions: Any, past: Any = None) -> Any:
        taps = Taps(lambda _: True)
        model = nnx.merge(self.graph, state)
        logits, after = model.draft(streams, ids, positions, taps=taps, past=past)
        return logits, after, taps.values

    def inputs(self, tokens: int) -> tuple[np.ndarray, ...]:
        """Streams, ids and positions of the first tokens."""
        return tuple(part[:, :tokens] for part in self.whole)

    def expected(self, tokens: int) -> dict[str, np.ndarray]:
        """Every tap of the first tokens, which do not see those after them."""
        return {name: value[:, :tokens] for name, value in self.taps.items()}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("mtp"))


def _largest_excess(found: dict[str, Any], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """By tap: the largest error as a multiple of 1e-5 (absolute, and as much relative)."""
    excess = {}
    for name, wanted in expected.items():
        value = np.asarray(found[f"mtp.0.{name}"])
        assert value.shape == wanted.shape, name
        if name in UNORDERED:
            value, wanted = np.sort(value), np.sort(wanted)
        excess[name] = float((np.abs(value - wanted) / (1e-5 + 1e-5 * np.abs(wanted))).max())
    return excess


@pytest.mark.parametrize("tokens", LENGTHS)
def test_every_tap_is_that_of_the_reference(setting: Setting, tokens: int) -> None:
    expected = setting.expected(tokens)
    logits, _, taps = setting.run(*setting.inputs(tokens))
    assert set(taps) == {f"mtp.0.{name}" for name in expected}
    assert all(np.asarray(value).std() > 1e-3 for value in expected.values()), "a value without spread shows nothing"
    over = {name: excess for name, excess in _largest_excess(taps, expected).items() if excess > 1}
    assert over == {}
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5, rtol=1e-5)


def _decode(setting: Setting, steps: list[tuple[int, int]]) -> tuple[np.ndarray, LayerCache]:
    """Logits of calls that see ``count`` more pairs and keep ``keep`` of them; those that are kept, and the state."""
    streams, ids, positions = setting.inputs(LENGTHS[-1])
    most = max(count for count, _ in steps)
    streams, ids, positions = (
        np.concatenate([part, np.repeat(part[:, -1:], most, axis=1)], axis=1) for part in (streams, ids, positions)
    )
    (cache,) = empty_stages(setting.config, BATCH, jnp.float32)
    logits, start = [], 0
    for count, keep in steps:
        numbers = (jnp.full(BATCH, number, jnp.int32) for number in (start, count, keep))
        part = slice(start, start + most)
        found, cache, _ = setting.run(
            streams[:, part], ids[:, part], positions[:, part], Past(cache, *map(jnp.asarray, numbers))
        )
        logits.append(np.asarray(found)[:, :keep])
        start += keep
    return np.concatenate(logits, axis=1), cache


@pytest.mark.parametrize(
    "steps",
    [[(1, 1)] * LENGTHS[-1], [(9, 9)] * 5, [(3, 1)] * 3 + [(3, 3)] * 14],
    ids=["one by one", "in parts", "some forgotten"],
)
def test_token_by_token_is_the_whole_prompt(setting: Setting, steps: list[tuple[int, int]]) -> None:
    whole = setting.expected(LENGTHS[-1])
    logits, cache = _decode(setting, steps)
    np.testing.assert_allclose(logits, whole["logits"], atol=1e-5, rtol=1e-5)
    kept = setting.config.sliding_window - 1
    np.testing.assert_allclose(cache.window, whole["attn.kv_rope"][:, -kept:], atol=1e-5, rtol=1e-5)


def _swap_projections(stage: MTPBlock) -> None:
    stage.e_proj, stage.h_proj = stage.h_proj, stage.e_proj


@pytest.mark.parametrize(
    ("fault", "tap"),
    [
        (lambda model: _swap_projections(model.mtp[0]), "e_proj"),
        (lambda model: setattr(model.mtp[0], "hnorm", model.mtp[0].enorm), "hnorm"),
        (lambda model: setattr(model.mtp[0], "hc_head_fn", model.hc_head_fn), "hc_head.pre"),
        (lambda model: setattr(model.mtp[0], "norm", model.norm), "norm"),
    ],
    ids=["projections swapped", "one norm for both", "the model's collapse", "the model's norm"],
)
def test_planted_faults_show_where_they_are(setting: Setting, fault: Callable[[Model], None], tap: str) -> None:
    inputs, expected = setting.inputs(20), setting.expected(20)
    model = nnx.merge(setting.graph, setting.state)
    fault(model)
    taps = Taps(lambda _: True)
    model.draft(*map(jnp.asarray, inputs), taps=taps)
    failing = {name for name, excess in _largest_excess(taps.values, expected).items() if excess > 100}
    assert next(name for name in expected if name in failing) == tap
    assert "logits" in failing


def test_another_position_and_another_table_show(setting: Setting) -> None:
    """The position is that of the streams' token; the table is the one without YaRN, of base ``rope_theta``."""
    streams, ids, positions = setting.inputs(20)
    expected = setting.expected(20)
    _, _, late = setting.run(streams, ids, positions + 1)
    model = nnx.merge(setting.graph, setting.state)
    model.mtp[0].attn.kind = AttentionKind.CSA
    taps = Taps(lambda _: True)
    model.draft(*map(jnp.asarray, (streams, ids, positions)), taps=taps)
    for found in (late, taps.values):
        excess = _largest_excess(found, expected)
        assert excess["attn.q"] < 1 < 100 < excess["attn.q_rope"]
