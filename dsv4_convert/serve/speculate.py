"""Speculative decoding: the draft stages draft tokens, and the next pass through the model accepts or rejects them.

Shape letters: ``B`` prompts, ``S`` tokens of a call, ``K`` drafted tokens, ``C`` = K + 1 choices, ``N`` streams.

The stages draft K tokens: one with multi-token prediction, a block with DSpark. A pass takes 2 K + 1 tokens of each
prompt: 1 to K + 1 that are certain but not in the cache yet, and then the drafts. The logits of the last certain token
give the next token. If that is the first draft, the draft's logits give one more, and so on: up to K + 1 tokens for one
pass. The drafts from the first wrong one on are dropped, since the cache keeps only the certain tokens.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dsv4_convert.model import Cache, Numerics, Taps
from dsv4_convert.model.cache import Past, empty_stages
from dsv4_convert.model.model import Decoder
from dsv4_convert.spec.config import Config

if TYPE_CHECKING:
    from jaxtyping import Array, Int, Shaped


@dataclasses.dataclass(frozen=True)
class Drafts:
    """How many tokens were drafted, and how many of these the model accepted."""

    drafted: int
    accepted: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodingState:
    """State after the same tokens of every prompt, in the model and in its draft stages."""

    model: Cache
    stages: tuple[Any, ...]

    @classmethod
    def empty(cls, config: Config, batch: int, capacity: int, dtype: DTypeLike, numerics: Numerics) -> DecodingState:
        """The state before the first token, for ``capacity`` tokens of each prompt."""
        return cls(
            Cache.empty(config, batch, capacity, dtype=dtype, numerics=numerics),
            empty_stages(config, batch, dtype),
        )


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(
    graph: nnx.GraphDef[Decoder],
    state: nnx.State[Any, Any],
    decoding: DecodingState,
    tokens: Int[Array, "B S"],
    following: Int[Array, "B S"],
    count: Int[Array, " B"],
) -> DecodingState:
    """Add ``count`` tokens of each prompt; the stages read each together with the token after it."""
    model = nnx.merge(graph, state)
    reading = model.reading_drafts()
    _, cache = model.advance(tokens, decoding.model, count=count, taps=reading)
    seen = decoding.model
    _, stages = model.propose(reading, following, seen.first, Past(decoding.stages, seen.tokens, count))
    return DecodingState(cache, stages)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def verify(
    graph: nnx.GraphDef[Decoder],
    state: nnx.State[Any, Any],
    decoding: DecodingState,
    tokens: Int[Array, "B S"],
    certain: Int[Array, " B"],
    drafted: Int[Array, " B"],
) -> tuple[DecodingState, Int[Array, "B C"], Int[Array, " B"], Int[Array, "B K"]]:
    """One pass.

    Args:
        graph, state: the model.
        decoding: the state before this pass.
        tokens: certain tokens, drafts, padding.
        certain: how many tokens are certain; 0 for a prompt that takes no part.
        drafted: how many drafts follow these.

    Returns:
        The state after the certain tokens. The first choice after the last certain token, and after each draft. How
        many drafts are accepted; one choice more than these counts. The drafts after the last choice that counts.
    """
    model = nnx.merge(graph, state)
    reading, seen = model.reading_drafts(), decoding.model
    leaving, cache = model.advance(tokens, seen, count=certain + drafted, keep=certain, taps=reading)
    last = jnp.maximum(certain - 1, 0)
    most = model.config.draft_tokens
    at = last[:, None] + jnp.arange(most + 1)
    leaving = jax.tree.map(partial(_rows_at, at=at), leaving)
    chosen = jnp.argmax(model.logits(leaving, Taps()), axis=-1).astype(jnp.int32)
    right = (chosen[:, :-1] == _rows_at(tokens, at[:, 1:])) & (jnp.arange(most) < drafted[:, None])
    accepted = jnp.sum(jnp.cumprod(right, axis=1), axis=1)

    # The stages read each token of this pass together with the token that follows it.
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    following = following.at[jnp.arange(len(tokens))[:, None], at].set(chosen)
    past = Past(decoding.stages, seen.tokens, certain + accepted, certain)
    drafts, stages = model.propose(reading, following, seen.first, past)
    return DecodingState(cache, stages), chosen, accepted, drafts.tokens


def _rows_at(rows: Shaped[Array, "B S *rest"], at: Int[Array, "B Y"]) -> Shaped[Array, "B Y *rest"]:
    """The rows of some tokens of every prompt."""
    return jnp.take_along_axis(rows, at.reshape(*at.shape, *(1,) * (rows.ndim - 2)), axis=1)
