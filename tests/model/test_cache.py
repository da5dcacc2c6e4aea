"""A prompt in parts gives what it gives in one piece: taps, logits and, in the end, the state."""

from __future__ import annotations

import math
from functools import partial
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_convert.errors import UsageError
from dsv4_convert.golden.synthetic import tiny_config
from dsv4_convert.model import Cache, Model, Taps, attention
from dsv4_convert.model.attention import gathers
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.taps import TapKey
from dsv4_convert.spec.v4.kinds import AttentionKind

from .weights import random_model

TOKENS = 150
CAPACITY = 160


class Small:
    """The small model with random weights, its functions compiled once, and two prompts."""

    def __init__(self) -> None:
        self.config = Config.from_hf(tiny_config(num_hidden_layers=3, compress_ratios=[0, 4, 128, 0]))
        self._graph, self._weights = random_model(self.config)
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(0, self.config.vocab_size, (2, TOKENS)).astype(np.int32)
        # Every call records, so that one program serves all tests of a length. Weights are arguments: as constants of
        # a program they take longer to compile.
        self.extend = partial(jax.jit(self._extend, static_argnames="last_only"), self._weights)
        self.at = partial(jax.jit(self._whole), self._weights)

    def _model(self, weights: Any) -> Model:
        return nnx.merge(self._graph, weights)

    def _extend(self, weights, tokens, cache, count=None, keep=None, *, last_only: bool = False):
        taps = Taps(lambda _: True)
        model = self._model(weights)
        logits, cache = model.extend(tokens, cache, count=count, keep=keep, last_only=last_only, taps=taps)
        return logits, cache, taps.values

    def _whole(self, weights, tokens, positions):
        taps = Taps(lambda _: True)
        return self._model(weights)(tokens, positions=positions, taps=taps), taps.values

    def whole(self, tokens):
        return self.at(tokens, np.arange(tokens.shape[1], dtype=np.int32)[None].repeat(2, 0))

    def empty(self, batch: int = 2) -> Cache:
        return Cache.empty(self.config, batch, CAPACITY)


@pytest.fixture(scope="module")
def small() -> Small:
    model = Small()
    assert {AttentionKind.SLIDING, AttentionKind.CSA, AttentionKind.HCA} == set(model.config.attention)
    assert model.config.sliding_window < TOKENS
    assert max(model.config.csa_ratio, model.config.hca_ratio) < TOKENS
    return model


def _check(
    small: Small, found: dict[str, np.ndarray], whole: dict[str, np.ndarray], row: int, start: int, stop: int
) -> None:
    """The taps of tokens ``start:stop`` of one prompt; of entries those that became complete among them."""
    for name, value in found.items():
        key = TapKey.parse(name)
        axes, expected, value = key.tap.shape.split(), np.asarray(whole[name])[row], np.asarray(value)[row]
        first, last = start, stop
        if axes[1] == "T":
            ratio = small.config.ratio_of(key.layer)
            first, last = start // ratio, stop // ratio
        expected, value = expected[first:last], value[: last - first]
        if axes[2:] == ["T"]:  # index scores: only those of complete blocks mean something
            entries = np.arange(expected.shape[1])
            seen = entries < (np.arange(start, stop)[:, None] + 1) // small.config.csa_ratio
            expected, value = np.where(seen, expected, 0), np.where(seen, value[:, : len(entries)], 0)
        if axes[2:] == ["k"]:
            width = min(expected.shape[1], value.shape[1])
            assert (value[:, width:] == -1).all()
            expected, value = expected[:, :width], value[:, :width]
        np.testing.assert_allclose(value, expected, atol=1e-5, rtol=1e-5, err_msg=f"{name} {start}:{stop}")


@pytest.mark.parametrize("lengths", [[TOKENS], [15] * 10], ids=["whole", "parts"])
def test_parts_give_what_the_whole_prompt_gives(small: Small, lengths: list[int]) -> None:
    logits, whole = small.whole(small.tokens)
    cache, start = small.empty(), 0
    for length in lengths:
        stop = start + length
        part, cache, taps = small.extend(small.tokens[:, start:stop], cache)
        np.testing.assert_allclose(part, logits[:, start:stop], atol=1e-5, rtol=1e-5)
        for row in range(2):
            _check(small, taps, whole, row, start, stop)
        start = stop
    assert cache.tokens.tolist() == [TOKENS, TOKENS]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20))
def test_any_split_with_padding_in_any_row(small: Small, counts: list[tuple[int, int]]) -> None:
    """Each step gives either prompt its own number of tokens, and fills up with others that nothing may see."""
    logits, whole = small.whole(small.tokens)
    rng = np.random.default_rng(len(counts))
    cache, start = small.empty(), np.zeros(2, int)
    for count in map(np.array, counts):
        fed = rng.integers(0, small.config.vocab_size, (2, 9)).astype(np.int32)
        count = np.minimum(count, TOKENS - start)
        for row in range(2):
            fed[row, : count[row]] = small.tokens[row, start[row] : start[row] + count[row]]
        part, cache, taps = small.extend(fed, cache, count.astype(np.int32))
        for row, (first, last) in enumerate(zip(start, start + count, strict=True)):
            np.testing.assert_allclose(part[row, : count[row]], logits[row, first:last], atol=1e-5, rtol=1e-5)
            _check(small, taps, whole, row, first, last)
        start += count
    assert np.array_equal(cache.tokens, start)


def test_decoding_compiles_once_and_token_by_token_is_the_whole_prompt(small: Small) -> None:
    logits, _ = small.whole(small.tokens)
    step = jax.jit(lambda weights, tokens, cache: small._extend(weights, tokens, cache)[:2], donate_argnums=2)
    cache = small.empty()
    for token in range(TOKENS):
        part, cache = step(small._weights, small.tokens[:, token : token + 1], cache)
        np.testing.assert_allclose(part[:, 0], logits[:, token], atol=1e-5, rtol=1e-5)
    assert step._cache_size() == 1


def test_the_state_is_that_of_the_whole_prompt_however_it_came(small: Small) -> None:
    _, at_once, _ = small.extend(small.tokens, small.empty())
    cache = small.empty()
    for start in range(0, TOKENS, 15):
        _, cache, _ = small.extend(small.tokens[:, start : start + 15], cache)
    for path, one in jax.tree_util.tree_leaves_with_path(at_once):
        other = dict(jax.tree_util.tree_leaves_with_path(cache))[path]
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5, err_msg=str(path))


def test_positions_begin_where_the_cache_says(small: Small) -> None:
    """A prompt at an offset is the whole model with those positions, which are given and not counted."""
    first = np.array([65_536, 1_000_001], np.int32)
    far, _ = small.at(small.tokens, first[:, None] + np.arange(TOKENS, dtype=np.int32))
    expected = far[:, :30]
    cache = Cache.empty(small.config, 2, CAPACITY, first=first)
    one, cache, _ = small.extend(small.tokens[:, :15], cache)
    other, cache, _ = small.extend(small.tokens[:, 15:30], cache)
    np.testing.assert_allclose(np.concatenate([one, other], axis=1), expected, atol=1e-5, rtol=1e-5)
    plain, _ = small.whole(small.tokens)
    assert np.abs(np.asarray(expected) - plain[:, :30]).max() > 1e-4  # far angles are rounded, so positions show


def test_last_only_is_the_last_token_of_each_prompt(small: Small) -> None:
    count = np.array([4, 9], np.int32)
    every, _, _ = small.extend(small.tokens[:, :9], small.empty(), count)
    last, _, _ = small.extend(small.tokens[:, :9], small.empty(), count, last_only=True)
    assert last.shape == (2, 1, small.config.vocab_size)
    np.testing.assert_allclose(last[:, 0], np.stack([every[0, 3], every[1, 8]]), atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 3), st.integers(0, 6)] * 2), min_size=1, max_size=30))
def test_what_is_not_kept_leaves_no_trace(small: Small, steps: list[tuple[int, int, int, int]]) -> None:
    """Each step keeps some tokens of either prompt and forgets others, which are not those that come next."""
    logits, _ = small.whole(small.tokens)
    rng = np.random.default_rng(len(steps))
    cache, start = small.empty(), np.full(2, 120)
    for at in range(0, 120, 15):
        _, cache, _ = small.extend(small.tokens[:, at : at + 15], cache)
    for step in steps:
        keep = np.minimum(step[::2], TOKENS - start).astype(np.int32)
        fed = rng.integers(0, small.config.vocab_size, (2, 9)).astype(np.int32)
        for row in range(2):
            fed[row, : keep[row]] = small.tokens[row, start[row] : start[row] + keep[row]]
        part, cache, _ = small.extend(fed, cache, keep + np.array(step[1::2], np.int32), keep)
        for row, (first, last) in enumerate(zip(start, start + keep, strict=True)):
            np.testing.assert_allclose(part[row, : keep[row]], logits[row, first:last], atol=1e-5, rtol=1e-5)
        start += keep
    rest = np.minimum(TOKENS - start, 9).astype(np.int32)
    fed = np.stack([np.resize(small.tokens[row, at : at + 9], 9) for row, at in enumerate(np.minimum(start, 149))])
    part, cache, _ = small.extend(fed, cache, rest)
    for row, (first, last) in enumerate(zip(start, start + rest, strict=True)):
        np.testing.assert_allclose(part[row, : rest[row]], logits[row, first:last], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["at once", "compiled"])
def test_tokens_beyond_the_capacity_are_an_error_or_nan(small: Small, compiled: bool) -> None:
    """Prompt 1 is full after its 7 tokens of the second call; without a check, it loses its last blocks.

    The capacity of 22 is no multiple of a block: the last tokens need no entry of their own, and are right.
    """
    logits, _ = small.whole(small.tokens)
    cache = Cache.empty(small.config, 2, 22)
    _, cache, _ = small.extend(small.tokens[:, :15], cache, np.array([6, 15], np.int32))
    cache.refuse_overflow()
    tokens = np.stack([small.tokens[0, 6:15], small.tokens[1, 15:24]])
    found, cache, _ = small.extend(tokens, cache, np.array([9, 7], np.int32))
    np.testing.assert_allclose(found[1, :7], logits[1, 15:22], atol=1e-5, rtol=1e-5)
    cache.refuse_overflow()
    message = "holds 22 tokens of each prompt, and prompt 1 has 25: the logits of the last 3 are NaN; .*capacity=25"
    tokens = np.stack([small.tokens[0, 15:24], small.tokens[1, 22:31]])
    count = np.array([7, 3], np.int32)
    if not compiled:
        with pytest.raises(UsageError, match=message):
            small._extend(small._weights, jnp.asarray(tokens), cache, jnp.asarray(count))
        return
    found, cache, _ = small.extend(tokens, cache, count)
    np.testing.assert_allclose(found[0, :7], logits[0, 15:22], atol=1e-5, rtol=1e-5)
    assert np.isnan(found[1, :3]).all()
    with pytest.raises(UsageError, match=message):
        cache.refuse_overflow()


def test_gathered_entries_give_the_model_of_the_mask(small: Small) -> None:
    """Queries of this model choose 5 of up to 37 entries, so all tests here gather; the mask gives the same."""
    assert gathers(TOKENS // small.config.csa_ratio, small.config.index_topk)
    _, gathered = small.whole(small.tokens)
    anew = partial(jax.jit(lambda *given: small._whole(*given)), small._weights)
    with patch.object(attention, "GATHER_FROM", math.inf), patch.object(small, "at", anew):
        _, masked = small.whole(small.tokens)
    for name, value in masked.items():
        np.testing.assert_allclose(gathered[name], value, atol=1e-5, rtol=1e-5, err_msg=name)
    assert (np.asarray(gathered["layers.1.attn.context"]) != masked["layers.1.attn.context"]).any(), "another program"
