"""Masks and choices against values worked out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_convert.model.attention import attend, complete_blocks, window_mask
from dsv4_convert.model.compressor import _with_previous
from dsv4_convert.model.indexer import choose, chosen_mask, entry_mask
from dsv4_convert.model.ops import map_query_chunks


def test_window_mask_is_the_last_tokens_including_the_query() -> None:
    distance = jnp.arange(4)[:, None] - jnp.arange(4)
    assert np.array_equal(
        window_mask(distance, 2).astype(int),
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]],
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 2))
def test_chunks_are_the_rows_one_after_the_other(tokens: int, longest: int, batch: int) -> None:
    rows = np.arange(batch * tokens * 3).reshape(batch, tokens, 3)
    lengths = []

    def run(first, part, other):
        lengths.append(part.shape[1])
        return part + other[..., None], first + jnp.arange(part.shape[1]) + jnp.zeros((batch, 1), int)

    found, index = jax.jit(lambda *rows: map_query_chunks(run, longest, *rows))(rows, rows[..., 0])
    assert np.array_equal(found, rows + rows[..., :1])
    assert np.array_equal(index, np.broadcast_to(np.arange(tokens), (batch, tokens)))
    assert max(lengths) <= longest


def test_a_block_is_visible_from_its_own_last_token_on() -> None:
    # 11 tokens, blocks of 4: entries 0 and 1 are complete at tokens 3 and 7; the third block never is.
    visible = np.asarray(entry_mask(complete_blocks(jnp.arange(11)[None], 4), 2)).astype(int)
    assert visible.tolist() == [[[0, 0]] * 3 + [[1, 0]] * 4 + [[1, 1]] * 4]


def test_choose_takes_the_best_visible_ascending_with_none_last() -> None:
    scores = jnp.array([[[9.0, 1.0, 5.0, 7.0], [9.0, 1.0, 5.0, 7.0], [-3.0, -1.0, -2.0, 7.0]]])
    visible = jnp.array([[True, False, False, False], [True, True, True, False], [True, True, True, False]])
    assert choose(scores, visible, 2).tolist() == [[[0, -1], [0, 2], [1, 2]]]


def test_choose_is_per_query_and_takes_all_where_few_exist() -> None:
    scores = jnp.array([[[0.0, 1.0]], [[1.0, 0.0]]])
    visible = jnp.ones((1, 2), bool)
    assert choose(scores, visible, 1).tolist() == [[[1]], [[0]]]
    assert choose(scores, visible, 512).tolist() == [[[0, 1]], [[0, 1]]]
    assert choose(jnp.zeros((1, 3, 0)), jnp.ones((3, 0), bool), 512).shape == (1, 3, 0)


def test_chosen_mask_ignores_none() -> None:
    mask = chosen_mask(jnp.array([[[0, -1], [1, 2], [-1, -1]]]), 3)
    assert mask.astype(int).tolist() == [[[1, 0, 0], [0, 1, 1], [0, 0, 0]]]


def test_overlapping_rows_are_the_previous_blocks_first_and_the_own_second_half() -> None:
    # One batch, two blocks of two tokens, entries of one channel: token t carries (10 t, 10 t + 1).
    rows = jnp.array([[[[0.0, 1.0], [10.0, 11.0]], [[20.0, 21.0], [30.0, 31.0]]]])
    assert _with_previous(rows, -7.0)[0, :, :, 0].tolist() == [[-7.0, -7.0, 1.0, 11.0], [0.0, 10.0, 21.0, 31.0]]


def test_the_sink_takes_its_share_and_gives_nothing() -> None:
    # One query, two equal keys, one of them unseen: softmax over {score 0, sink ln 3} is 1/4 and 3/4.
    q, kv = jnp.zeros((1, 1, 1, 2)), jnp.array([[[4.0, 8.0], [100.0, 100.0]]])
    context = attend(q, (kv,), jnp.array([[[True, False]]]), jnp.log(jnp.array([3.0])))
    np.testing.assert_allclose(context[0, 0, 0], [1.0, 2.0], rtol=1e-6)
