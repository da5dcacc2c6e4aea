"""DSpark's stages against mlx-vlm's, which other people wrote, tap by tap: as recorded in ``tests/data/drafts``.

The recording is repeated by ``nox -s witnesses`` (tests/witnesses/test_mlx.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from dsv4_convert.model import Model, Taps
from dsv4_convert.model import dspark as drafts
from dsv4_convert.model.attention import attend
from dsv4_convert.model.cache import LayerCache, Past, empty_stages
from dsv4_convert.model.rope import frequencies
from dsv4_convert.spec.config import Config
from dsv4_convert.weights.published import PublishedWeights
from dsv4_convert.weights.restore import restore_model

from .drafting import BATCH, LENGTHS, RECORDED, inputs, make_checkpoint

#: Largest error in units of 1e-5, absolute and relative together. Measured: 0.44.
LIMIT = 1.0
#: Taps that no module of mlx-vlm ends with; the acceptance's logit it does not compute.
OUT_OF_REACH = {
    *("embed", "input", "hc_attn.pre", "hc_ffn.pre", "hc_attn.streams", "attn.q", "attn.q_rope", "attn.kv_rope"),
    *(
        "targets",
        "main",
        "streams",
        "context",
        "attn.main.kv_rope",
        "attn.context",
        "attn.context_unrotated",
        "hc_head.pre",
        "confidence",
    ),
    *("ffn.experts", "ffn.shared_experts", "ffn.gate.logits", "ffn.gate.scores", "ffn.gate.experts"),
    "ffn.gate.weights",
}


#: Every tap that was met, in order of execution.
ORDER: dict[str, int] = {}


class Setting:
    """One tiny dated release, and what was recorded of it."""

    def __init__(self, folder: Path) -> None:
        self.model: Model = restore_model(PublishedWeights.open(make_checkpoint(folder)), drafts=True)
        self.config: Config = self.model.config
        self.graph, self.state = nnx.split(self.model)
        self.recorded = load_file(RECORDED)
        self.propose = jax.jit(propose, static_argnums=0)

    def run(self, streams: Any, following: Any, past: Any) -> Any:
        return self.propose(self.graph, self.state, streams, following, past)

    def expected(self, tokens: int) -> dict[str, np.ndarray]:
        prefix = f"{tokens}/"
        return {name.removeprefix(prefix): value for name, value in self.recorded.items() if name.startswith(prefix)}


def propose(graph: Any, state: Any, streams: Any, following: Any, past: Any) -> Any:
    """A draft after the last of the tokens that ``past`` counts; its activations, and the stages' states."""
    model = nnx.merge(graph, state)
    reading = model.reading_drafts()
    for place, layer in enumerate(model.config.draft_sources):
        reading.within(f"layers.{layer}.")("hc_ffn.streams", jnp.asarray(streams[:, :, place]))
    taps = Taps(lambda name: ORDER.setdefault(name, len(ORDER)) >= 0)
    drafted, states = model.propose(reading, following, jnp.zeros(len(following), jnp.int32), past, taps)
    return drafted, states, taps.values


def nothing_before(config: Config, count: int) -> Past[tuple[LayerCache, ...]]:
    return Past(
        empty_stages(config, BATCH, jnp.float32), jnp.zeros(BATCH, jnp.int32), jnp.full(BATCH, count, jnp.int32)
    )


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("dspark") / "hf")


def excess(found: dict[str, Any], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """By tap, in order of execution: the largest error as a multiple of 1e-5 (absolute, and as much relative)."""
    errors = {}
    for name in sorted(found.keys() & expected.keys(), key=ORDER.__getitem__):
        value, wanted = np.asarray(found[name]), expected[name]
        assert value.shape == wanted.shape, name
        errors[name] = float((np.abs(value - wanted) / (1e-5 + 1e-5 * np.abs(wanted))).max())
    return errors


@pytest.mark.parametrize("tokens", LENGTHS)
def test_every_tap_is_that_of_another_implementation(setting: Setting, tokens: int) -> None:
    expected = setting.expected(tokens)
    _, _, taps = setting.run(*inputs(tokens), nothing_before(setting.config, tokens))
    assert expected.keys() <= taps.keys()
    assert {name.split(".", 2)[2] for name in taps.keys() - expected.keys()} <= OUT_OF_REACH
    assert all(value.std() > 1e-3 for value in expected.values()), "a value without spread shows nothing"
    assert {name: error for name, error in excess(taps, expected).items() if error > LIMIT} == {}


@pytest.mark.parametrize(
    "calls",
    [[(1, 1)] * LENGTHS[-1], [(10, 10), (10, 10), (17, 17)], [(3, 1)] * 3 + [(6, 4)] * 8 + [(2, 2)]],
    ids=["one by one", "in parts", "some forgotten"],
)
def test_a_draft_after_parts_is_one_after_all(setting: Setting, calls: list[tuple[int, int]]) -> None:
    """Calls see ``count`` tokens and keep ``keep`` of them; rejected drafts leave nothing behind."""
    streams, following = inputs(LENGTHS[-1])
    most = max(count for count, _ in calls)
    streams, following = (np.concatenate([part, part[:, :most]], axis=1) for part in (streams, following))
    past, start = nothing_before(setting.config, 0), 0
    states = past.cache
    for count, keep in calls:
        numbers = (jnp.full(BATCH, number, jnp.int32) for number in (start, count, keep))
        part = slice(start, start + most)
        _, states, taps = setting.run(streams[:, part], following[:, part], Past(states, *numbers))
        start += keep
    assert start == LENGTHS[-1]
    block = {name: value for name, value in taps.items() if ".main" not in name}
    errors = excess(block, setting.expected(LENGTHS[-1]))
    assert {name: error for name, error in errors.items() if error > LIMIT} == {}


def test_prompts_of_one_call_have_lengths_of_their_own(setting: Setting) -> None:
    """The first prompt's draft is that after 7 tokens, the second's that after 16."""
    both = [inputs(tokens) for tokens in LENGTHS[:2]]
    room = LENGTHS[1]
    streams, following = (
        np.stack([np.resize(one[place][row], (room, *one[place].shape[2:])) for row, one in enumerate(both)])
        for place in (0, 1)
    )
    past = Past(nothing_before(setting.config, 0).cache, jnp.zeros(BATCH, jnp.int32), jnp.array(LENGTHS[:2], jnp.int32))
    drafted, _, _ = setting.run(streams, following, past)
    for row, tokens in enumerate(LENGTHS[:2]):
        expected = setting.expected(tokens)
        assert np.array_equal(drafted.tokens[row], expected["mtp.2.tokens"][row, :, 0])
        np.testing.assert_allclose(drafted.logits[row], expected["mtp.2.draft_logits"][row], atol=1e-5, rtol=1e-5)


def test_a_chosen_token_decides_those_after_it(setting: Setting) -> None:
    """Parity follows a reference's choices: the logits then are those after its tokens."""
    own = setting.expected(7)
    other = (own["mtp.2.tokens"] + 1) % setting.config.vocab_size
    block, anchor = setting.model.mtp[2], jnp.asarray(inputs(7)[1][:, -1])
    taps = Taps(overrides={"tokens": jnp.asarray(other)})
    forced = block.choose(jnp.asarray(own["mtp.2.hc_head"]), jnp.asarray(own["mtp.2.logits"]), anchor, taps)
    before = np.concatenate([anchor[:, None], other[:, :-1, 0]], axis=1)
    head = block.markov_head
    bias = np.asarray(head.markov_w1[...])[before] @ np.asarray(head.markov_w2[...])
    np.testing.assert_allclose(forced.logits, own["mtp.2.logits"] + bias, atol=1e-5, rtol=1e-5)


def test_the_confidence_is_a_product_with_streams_and_the_token_before(setting: Setting) -> None:
    tokens = LENGTHS[-1]
    expected = setting.expected(tokens)
    drafted, _, _ = setting.run(*inputs(tokens), nothing_before(setting.config, tokens))
    proj = np.asarray(setting.model.mtp[2].confidence_head.proj[...])
    both = np.concatenate([expected["mtp.2.hc_head"], expected["mtp.2.markov_head.embed"]], axis=-1)
    np.testing.assert_allclose(drafted.confidence, (both @ proj)[..., 0], atol=1e-5, rtol=1e-5)


Plant = Callable[[Model, pytest.MonkeyPatch], None]


def _swap(stage: int, one: str, other: str) -> Plant:
    def plant(model: Model, _: pytest.MonkeyPatch) -> None:
        block = model.mtp[stage]
        first, second = getattr(block, one)[...], getattr(block, other)[...]
        getattr(block, one)[...], getattr(block, other)[...] = second, first

    return plant


def _set(stage: int, name: str, change: Callable[[Any], Any]) -> Plant:
    def plant(model: Model, _: pytest.MonkeyPatch) -> None:
        owner: Any = model.mtp[stage]
        for part in name.split("."):
            owner = getattr(owner, part)
        owner[...] = change(owner[...])

    return plant


def _patched(name: str, replacement: Any) -> Plant:
    return lambda model, patch: patch.setattr(drafts, name, replacement)


def _configured(**changes: Any) -> Plant:
    """The draft is made as if config.json said something else."""
    import dataclasses

    def plant(model: Model, _: pytest.MonkeyPatch) -> None:
        assert model.config.dspark is not None
        model.config = dataclasses.replace(model.config, dspark=dataclasses.replace(model.config.dspark, **changes))

    return plant


def _causal(q: Any, kv: Any, earlier: Any, sink: Any, *, numerics: Any) -> Any:
    window, block = earlier.keys.shape[1], kv.shape[1]
    known = jnp.arange(window) - window >= -earlier.tokens[:, None]
    after = jnp.broadcast_to(jnp.tril(jnp.ones((block, block), bool)), (len(q), block, block))
    seen = jnp.concatenate([jnp.broadcast_to(known[:, None], (len(q), block, window)), after], axis=2)
    return attend(q, (jnp.concatenate([earlier.keys, kv], axis=1),), seen, sink)


def _sliding(q: Any, kv: Any, earlier: Any, sink: Any, *, numerics: Any) -> Any:
    """As in a layer, the window moves with the query."""
    window, block = earlier.keys.shape[1], kv.shape[1]
    token = jnp.arange(window + block) - window
    near = token[None] > jnp.arange(block)[:, None] - window
    seen = near[None] & (token >= -earlier.tokens[:, None])[:, None]
    return attend(q, (jnp.concatenate([earlier.keys, kv], axis=1),), seen, sink)


def _blind(q: Any, kv: Any, earlier: Any, sink: Any, *, numerics: Any) -> Any:
    """The block does not see itself."""
    window = earlier.keys.shape[1]
    known = jnp.arange(window) - window >= -earlier.tokens[:, None]
    seen = jnp.broadcast_to(known[:, None], (len(q), q.shape[1], window))
    return attend(q, (earlier.keys,), seen, sink)


def _yarn(config: Config, *, compressed: bool) -> Any:
    return frequencies(config, compressed=True)


def _features(change: Callable[[Any, Any], Any]) -> Plant:
    """The first stage reads the streams otherwise; ``change`` gets its method and the streams."""
    original = drafts.DSparkBlock.context
    return lambda model, patch: patch.setattr(
        drafts.DSparkBlock, "context", lambda self, features, taps: original(self, change(self, features), taps)
    )


def _refined(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Plant:
    original = drafts.DSparkBlock.refine
    names = ("carry", "token_ids", "context", "positions", "past", "taps")

    def refine(self: Any, *arguments: Any) -> Any:
        return original(self, **change(dict(zip(names, arguments, strict=True))))

    return lambda model, patch: patch.setattr(drafts.DSparkBlock, "refine", refine)


def _one_fewer(past: Any) -> Any:
    return Past(past.cache, past.before, past.count - 1, past.keep)


def _stateless_markov(model: Model, patch: pytest.MonkeyPatch) -> None:
    """Every token is chosen as if the anchor stood before it."""
    original = drafts.DSparkBlock.choose

    def choose(self: Any, x: Any, logits: Any, anchor: Any, taps: Taps) -> Any:
        parts = [original(self, x[:, at : at + 1], logits[:, at : at + 1], anchor, taps) for at in range(x.shape[1])]
        joined = [jnp.concatenate([getattr(part, name) for part in parts], axis=1) for name in parts[0]._fields]
        for name in ("markov_head.embed", "markov_head", "draft_logits"):
            taps.values.pop(f"mtp.2.{name}")
        taps.record("tokens", joined[0][..., None])
        return drafts.Drafted(*joined)

    patch.setattr(drafts.DSparkBlock, "choose", choose)


#: Name -> fault, and the first tap that shows it.
IN_THE_MODEL: dict[str, tuple[Plant, str]] = {
    "main_norm forgotten": (_set(0, "main_norm", jnp.ones_like), "mtp.0.main_norm"),
    "main_norm is the last norm": (
        lambda model, _: model.mtp[0].main_norm.set_value(model.mtp[2].norm[...]),
        "mtp.0.main_norm",
    ),
    "stages exchanged": (
        lambda model, _: model.mtp[0].attn.wkv.set_value(model.mtp[1].attn.wkv[...]),
        "mtp.0.attn.main.wkv",
    ),
    "another noise token": (_configured(noise_token_id=3), "mtp.0.hc_attn.post"),
    "the model's collapse": (
        lambda model, _: model.mtp[2].hc_head_fn.set_value(model.hc_head_fn[...]),
        "mtp.2.hc_head",
    ),
    "the model's norm": (lambda model, _: model.mtp[2].norm.set_value(model.norm[...]), "mtp.2.norm"),
    "markov table transposed": (
        lambda model, _: model.mtp[2].markov_head.markov_w1.set_value(model.mtp[2].markov_head.markov_w2[...].T),
        "mtp.2.markov_head.embed",
    ),
    "markov head forgotten": (_set(2, "markov_head.markov_w2", jnp.zeros_like), "mtp.2.markov_head.embed"),
    "hyper-connections exchanged": (_swap(1, "hc_attn_fn", "hc_ffn_fn"), "mtp.1.hc_attn.post"),
    "sink forgotten": (_set(1, "attn.attn_sink", lambda sink: sink - 30), "mtp.1.attn.wo_a"),
    "router's bias forgotten": (_set(1, "ffn.gate.bias", lambda bias: -9 * bias), "mtp.1.ffn"),
}
IN_THE_CODE: dict[str, tuple[Plant, str]] = {
    "targets in another order": (_features(lambda _, streams: streams[:, :, ::-1]), "mtp.0.main_proj"),
    "sum of the streams": (_features(lambda _, streams: streams * streams.shape[3]), "mtp.0.main_proj"),
    "block causal": (_patched("_block_context", _causal), "mtp.0.attn.wo_a"),
    "window moves with the query": (_patched("_block_context", _sliding), "mtp.0.attn.wo_a"),
    "block does not see itself": (_patched("_block_context", _blind), "mtp.0.attn.wo_a"),
    "block begins a position late": (
        _refined(lambda given: {**given, "positions": given["positions"].at[:, 0].add(1)}),
        "mtp.0.attn.wo_a",
    ),
    "last known token missing": (
        _refined(lambda given: {**given, "past": _one_fewer(given["past"])}),
        "mtp.0.attn.wo_a",
    ),
    "YaRN's table for the known tokens": (_patched("frequencies", _yarn), "mtp.0.attn.wo_a"),
    "the noise token before each": (_stateless_markov, "mtp.2.tokens"),
}


@pytest.mark.parametrize("name", [*IN_THE_MODEL, *IN_THE_CODE])
def test_planted_faults_show_where_they_are(setting: Setting, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plant, tap = (IN_THE_MODEL | IN_THE_CODE)[name]
    tokens = LENGTHS[-1]
    expected = setting.expected(tokens)
    model = nnx.merge(setting.graph, jax.tree.map(jnp.copy, setting.state))
    plant(model, monkeypatch)

    def anew(*arguments: Any) -> Any:  # JAX takes the program of a function that it has seen
        return propose(*arguments)

    run = setting.propose if name in IN_THE_MODEL else jax.jit(anew, static_argnums=0)
    _, _, taps = run(*nnx.split(model), *inputs(tokens), nothing_before(setting.config, tokens))
    failing = [name for name, error in excess(taps, expected).items() if error > 100 * LIMIT]
    assert failing, "nothing shows it"
    assert failing[0] == tap
