"""The memory of the forward pass grows with the prompt, not with its square: what XLA plans for its temporaries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dsv4_convert.golden.synthetic import tiny_config
from dsv4_convert.model import Block, Taps
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.v4.kinds import AttentionKind

CONFIG = Config.from_hf(tiny_config(index_topk=16))


def _temporaries(kind: AttentionKind, tokens: int, wanted: str | None = None) -> int:
    graph, state = nnx.split(nnx.eval_shape(lambda: Block(CONFIG, kind, hashed=False, with_experts=False)))

    def attend(state, streams, positions):
        taps = Taps(None if wanted is None else lambda name: name == wanted)
        return nnx.merge(graph, state).attend(streams, positions, positions, taps)[0], taps.values

    shape = (1, tokens, CONFIG.hc_mult, CONFIG.hidden_size)
    arguments = jax.eval_shape(lambda: (jnp.zeros(shape), jnp.zeros((1, tokens), jnp.int32)))
    return jax.jit(attend).lower(state, *arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kind", [AttentionKind.SLIDING, AttentionKind.CSA])
def test_twice_the_prompt_takes_twice_the_memory(kind: AttentionKind) -> None:
    short, long = (_temporaries(kind, tokens) for tokens in (4096, 8192))
    assert long / short < 2.1
    # All scores of one of the heads at once would be more than the whole pass takes.
    keys = 8192 if kind is AttentionKind.SLIDING else 8192 // CONFIG.csa_ratio
    assert long < 4 * 8192 * keys


def test_recorded_index_scores_are_the_square() -> None:
    """Shows that the test above would notice: recorded scores are one number per query and entry."""
    short, long = (_temporaries(AttentionKind.CSA, tokens, wanted="attn.indexer.scores") for tokens in (4096, 8192))
    assert long / short > 2.5
