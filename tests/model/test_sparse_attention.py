"""Attention over gathered entries is attention under a mask over all of them, at a cost that they do not change."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_convert.model import Numerics, attention
from dsv4_convert.model.attention import Earlier, Entries, _context, gathers

WINDOW, HEADS, WIDTH, ENTRIES, CHOSEN = 8, 2, 16, 40, 6
NEVER, ALWAYS = math.inf, 0


def _given(tokens: int, before: tuple[int, int] | None) -> tuple[Any, ...]:
    """Two prompts whose queries choose among their complete blocks, fewer than six where there are fewer."""
    rng = np.random.default_rng(0)
    q, kv = rng.normal(size=(2, tokens, HEADS, WIDTH)), rng.normal(size=(2, tokens, WIDTH))
    values = rng.normal(size=(2, ENTRIES, WIDTH))
    first = np.array(before or (0, 0))
    complete = (first[:, None] + np.arange(tokens) + 1) // 4
    best = [np.sort(rng.permutation(count)[:CHOSEN]) for count in complete.reshape(-1)]
    chosen = np.stack([np.pad(own, (0, CHOSEN - len(own)), constant_values=-1) for own in best])
    chosen = chosen.reshape(*complete.shape, CHOSEN)
    float32, int32 = (lambda array, dtype=dtype: jnp.asarray(array, dtype) for dtype in (jnp.float32, jnp.int32))
    past = Entries(float32(values), int32(complete), int32(chosen), jnp.full(2, WINDOW))
    earlier = None if before is None else Earlier(float32(rng.normal(size=(2, WINDOW - 1, WIDTH))), int32(first))
    return float32(q), float32(kv), earlier, past, float32(rng.normal(size=HEADS))


def _run(given: tuple[Any, ...], limit: float, rows: int = 8192) -> np.ndarray:
    with patch.object(attention, "GATHER_FROM", limit), patch.object(attention, "GATHERED_ROWS", rows):
        return np.asarray(_context(*given, window=WINDOW, numerics=Numerics()))


@pytest.mark.parametrize(
    ("tokens", "before"), [(50, None), (1, (3, 120)), (13, (100, 2))], ids=["prompt", "one token", "next tokens"]
)
@pytest.mark.parametrize("rows", [8192, 12, 1], ids=["one chunk", "a query of each prompt", "fewer rows than a query"])
def test_gathered_entries_give_what_the_mask_gives(tokens: int, before: tuple[int, int] | None, rows: int) -> None:
    given = _given(tokens, before)
    masked = _run(given, NEVER)
    np.testing.assert_allclose(_run(given, ALWAYS, rows), masked, atol=2e-6)
    moved = given[3]._replace(chosen=jnp.where(given[3].chosen < 0, -1, (given[3].chosen + 1) % ENTRIES))
    assert np.abs(_run((*given[:3], moved, given[4]), ALWAYS) - masked).max() > 0.1, "each entry is another"


def test_an_entry_that_is_not_chosen_is_not_read() -> None:
    """Entry 0 stands for an absent choice, and none of these queries sees it either."""
    given = _given(13, (100, 20))
    past = given[3]._replace(chosen=jnp.where(given[3].chosen <= 1, -1, given[3].chosen))
    other = past._replace(values=past.values.at[:, :2].add(100.0))
    first, second = (_run((*given[:3], entries, given[4]), ALWAYS) for entries in (past, other))
    np.testing.assert_array_equal(first, second)


def test_entries_are_gathered_where_they_outnumber_the_chosen() -> None:
    """At V4-Flash's choice of 512: up to 4,096 tokens the mask, beyond them the chosen rows."""
    assert not gathers(4096 // 4, 512)
    assert gathers(4104 // 4, 512)
    assert not gathers(0, 0)


def _operations(entries: int, limit: float) -> float:
    given = jax.eval_shape(lambda: _given(WINDOW, (1000, 1000)))
    past = given[3]._replace(values=jax.ShapeDtypeStruct((2, entries, WIDTH), jnp.float32))
    with patch.object(attention, "GATHER_FROM", limit):
        program = jax.jit(lambda *parts: _context(*parts, window=WINDOW, numerics=Numerics()))
        found: float = program.lower(*given[:3], past, given[4]).compile().cost_analysis()["flops"]
    return found


def test_operations_do_not_grow_with_the_entries() -> None:
    gathered, more = (_operations(entries, attention.GATHER_FROM) for entries in (64, 4096))
    assert more < 1.02 * gathered
    assert _operations(4096, NEVER) > 10 * more, "those of the mask do"
