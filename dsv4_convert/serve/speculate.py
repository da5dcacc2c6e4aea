"""Speculative decoding: the mtp stage drafts a token, and the next pass through the model accepts or rejects it.

Shape letters: ``B`` prompts, ``S`` tokens of a call, ``V`` vocabulary, ``N`` streams, ``D`` width.

A pass takes three tokens of each prompt: one or two that are certain but not in the cache yet, and then the draft. The
logits of the last certain token give the next token. If that is the draft, the draft's logits give one more: two tokens
for one pass. If not, the draft is dropped, since the cache keeps only the certain tokens.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dsv4_convert.model import Cache, Model, Numerics, Taps
from dsv4_convert.model.cache import LayerCache, Past, empty_layer
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.v4.kinds import AttentionKind

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int, Shaped

#: Tokens of a pass.
PASS = 3


@dataclasses.dataclass(frozen=True)
class Drafts:
    """How many tokens were drafted, and how many of these the model accepted."""

    drafted: int
    accepted: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodingState:
    """State after the same tokens of every prompt, in the model and in the mtp stage."""

    model: Cache
    stage: LayerCache

    @classmethod
    def empty(cls, config: Config, batch: int, capacity: int, dtype: DTypeLike, numerics: Numerics) -> DecodingState:
        """The state before the first token, for ``capacity`` tokens of each prompt."""
        return cls(
            Cache.empty(config, batch, capacity, dtype=dtype, numerics=numerics),
            empty_layer(config, (AttentionKind.SLIDING, False), batch, capacity, dtype),
        )


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(
    graph: nnx.GraphDef[Model],
    state: nnx.State[Any, Any],
    decoding: DecodingState,
    tokens: Int[Array, "B S"],
    following: Int[Array, "B S"],
    count: Int[Array, " B"],
) -> DecodingState:
    """Add ``count`` tokens of each prompt; the stage reads each together with the token after it."""
    model = nnx.merge(graph, state)
    streams, cache = model.advance(tokens, decoding.model, count=count, taps=Taps())
    _, stage = model.draft(
        streams, following, _positions(decoding.model, tokens), past=Past(decoding.stage, decoding.model.tokens, count)
    )
    assert stage is not None
    return DecodingState(cache, stage)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def verify(
    graph: nnx.GraphDef[Model],
    state: nnx.State[Any, Any],
    decoding: DecodingState,
    tokens: Int[Array, "B S"],
    certain: Int[Array, " B"],
    drafted: Bool[Array, " B"],
) -> tuple[DecodingState, Int[Array, "B 2"], Bool[Array, " B"], Int[Array, " B"]]:
    """One pass.

    Args:
        graph, state: the model.
        decoding: the state before this pass.
        tokens: certain tokens, a draft, padding.
        certain: how many tokens are certain; 0 for a prompt that takes no part.
        drafted: whether a draft follows these.

    Returns:
        The state after the certain tokens. The first choice after the last certain token, and after the draft. Whether
        the draft is accepted, so that the second choice counts too. The draft of the token after the last that counts.
    """
    model = nnx.merge(graph, state)
    streams, cache = model.advance(tokens, decoding.model, count=certain + drafted, keep=certain, taps=Taps())
    last = jnp.maximum(certain - 1, 0)
    both = jnp.stack([last, last + 1], axis=1)
    chosen = jnp.argmax(model.logits(_rows_at(streams, both), Taps()), axis=-1).astype(jnp.int32)
    accepted = drafted & (chosen[:, 0] == _rows_at(tokens, certain[:, None])[:, 0])

    # The stage reads pairs: each token of this pass, and the token that follows it.
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    following = following.at[jnp.arange(len(tokens))[:, None], both].set(chosen)
    logits, stage = model.draft(
        streams,
        following,
        _positions(decoding.model, tokens),
        only=last + accepted,
        past=Past(decoding.stage, decoding.model.tokens, certain + accepted, certain),
    )
    assert stage is not None
    return DecodingState(cache, stage), chosen, accepted, jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)


def _positions(cache: Cache, tokens: Int[Array, "B S"]) -> Int[Array, "B S"]:
    return (cache.first + cache.tokens)[:, None] + jnp.arange(tokens.shape[1])


def _rows_at(rows: Shaped[Array, "B S *rest"], at: Int[Array, "B Y"]) -> Shaped[Array, "B Y *rest"]:
    """The rows of some tokens of every prompt."""
    return jnp.take_along_axis(rows, at.reshape(*at.shape, *(1,) * (rows.ndim - 2)), axis=1)
