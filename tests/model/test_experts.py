"""The two ways to compute routed experts, against each other and against a plain loop in PyTorch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_convert.model import encoded
from dsv4_convert.model.experts import grouped, packed
from dsv4_convert.model.router import Routing

LIMIT = 0.7  # low, so that both clamps bite
#: Both ways, compiled once for every shape.
GROUPED, PACKED = (
    jax.jit(lambda x, pick, shares, *stacks, way=way: way(x, Routing(pick, shares), *stacks, limit=LIMIT))
    for way in (grouped, packed)
)


def _case(tokens: int, experts: int, chosen: int, seed: int, *, crowded: bool = False) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, 24)).astype(np.float32)
    pick = np.stack([rng.permutation(experts)[:chosen] for _ in range(tokens)]).astype(np.int32)
    if crowded:
        pick[:, 0] = experts - 1
    shares = rng.uniform(0.1, 1, size=(tokens, chosen)).astype(np.float32)
    shapes = ((experts, 24, 40), (experts, 40, 24), (experts, 24, 40))
    return [x, pick, shares, *(rng.normal(size=shape).astype(np.float32) / 5 for shape in shapes)]


def _loop(x: np.ndarray, pick: np.ndarray, shares: np.ndarray, *stacks: np.ndarray) -> np.ndarray:
    """Every choice on its own, in float64."""
    x64, w1, w2, w3 = (torch.from_numpy(array).double() for array in (x, *stacks))
    total = torch.zeros_like(x64)
    for token in range(len(x)):
        for slot, expert in enumerate(pick[token]):
            gate = (x64[token] @ w1[expert]).clamp(max=LIMIT)
            up = (x64[token] @ w3[expert]).clamp(-LIMIT, LIMIT)
            total[token] += float(shares[token, slot]) * ((torch.nn.functional.silu(gate) * up) @ w2[expert])
    return total.numpy()


@pytest.mark.parametrize("way", [GROUPED, PACKED], ids=["grouped", "packed"])
@pytest.mark.parametrize(
    ("tokens", "experts", "chosen", "crowded"),
    [(1, 4, 1, False), (5, 9, 3, False), (70, 3, 2, True), (200, 16, 4, True), (8, 30, 1, True), (2, 30, 1, True)],
)
def test_equal_to_a_plain_loop(way, tokens: int, experts: int, chosen: int, crowded: bool) -> None:
    case = _case(tokens, experts, chosen, seed=tokens, crowded=crowded)
    found = way(*map(jnp.asarray, case))
    np.testing.assert_allclose(found, _loop(*case), atol=3e-6)


@settings(max_examples=15)
@given(st.sampled_from([1, 80]), st.sampled_from([1, 7]), st.just(4), st.integers(0, 2**16))
def test_both_ways_agree(tokens: int, experts: int, chosen: int, seed: int) -> None:
    case = [jnp.asarray(array) for array in _case(tokens, experts, min(chosen, experts), seed)]
    np.testing.assert_allclose(PACKED(*case), GROUPED(*case), atol=3e-6)


def test_a_matrix_out_of_a_stack_is_multiplied_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block has at most 96 numbers; the last stack's rows do not divide into such blocks."""
    monkeypatch.setattr(encoded, "_BLOCK", 96)
    rng = np.random.default_rng(5)
    for inputs, rows in ((24, 5), (32, 1), (27, 2)):
        x, stack = rng.normal(size=(rows, inputs)), rng.normal(size=(3, inputs, 16))
        run = jax.jit(lambda x, stack, at: encoded.Member(stack, at).product(x, jnp.float32))
        found = run(*(jnp.asarray(array, jnp.float32) for array in (x, stack)), jnp.int32(2))
        np.testing.assert_allclose(found, x @ stack[2], atol=1e-5)


def test_an_expert_that_nobody_chose_is_not_computed() -> None:
    """Its weights may be anything."""
    case = _case(6, 5, 2, seed=3)
    case[1] = np.where(case[1] == 4, (case[1].min(axis=1, keepdims=True) + 1) % 4, case[1]).astype(np.int32)
    expected = PACKED(*map(jnp.asarray, case))
    for stack in case[3:]:
        stack[4] = np.nan
    found = PACKED(*map(jnp.asarray, case))
    assert np.isfinite(expected).all()
    assert np.array_equal(found, expected)
