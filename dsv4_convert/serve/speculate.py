"""Speculative decoding: the mtp stage drafts a token, and the next pass through the model says whether it is right.

Shape letters: ``B`` prompts, ``S`` tokens of a call, ``V`` vocabulary, ``N`` streams, ``D`` width.

A pass takes three tokens of each prompt: the one or two that are certain but not in the cache yet, and behind them the
draft. The logits of the last certain token give the next token. If that is the draft, the draft's logits give one more:
two tokens for one pass. If not, the draft is forgotten, as the cache remembers the certain tokens only.
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
from dsv4_convert.spec.config import AttentionKind, Config

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int, Shaped

#: Tokens of a pass.
PASS = 3


@dataclasses.dataclass(frozen=True)
class Drafts:
    """How many tokens were drafted, and how many of them the model would have said itself."""

    drafted: int
    accepted: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """What was seen of the prompts: by the model, and by the stage, whose tokens are as many."""

    model: Cache
    stage: LayerCache

    @classmethod
    def nothing(cls, config: Config, batch: int, capacity: int, dtype: DTypeLike, numerics: Numerics) -> Seen:
        """Room for ``capacity`` tokens of each prompt."""
        return cls(
            Cache.empty(config, batch, capacity, dtype=dtype, numerics=numerics),
            empty_layer(config, AttentionKind.SLIDING, batch, capacity, dtype),
        )


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def read(
    graph: nnx.GraphDef[Model],
    state: nnx.State[Any, Any],
    seen: Seen,
    tokens: Int[Array, "B S"],
    following: Int[Array, "B S"],
    count: Int[Array, " B"],
) -> Seen:
    """``count`` tokens of each prompt, and the token after each of them, which the stage sees too."""
    model = nnx.merge(graph, state)
    streams, cache = model.advance(tokens, seen.model, count=count, taps=Taps())
    _, stage = model.draft(
        streams, following, _positions(seen.model, tokens), past=Past(seen.stage, seen.model.tokens, count)
    )
    assert stage is not None
    return Seen(cache, stage)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def verify(
    graph: nnx.GraphDef[Model],
    state: nnx.State[Any, Any],
    seen: Seen,
    tokens: Int[Array, "B S"],
    certain: Int[Array, " B"],
    drafted: Bool[Array, " B"],
) -> tuple[Seen, Int[Array, "B 2"], Bool[Array, " B"], Int[Array, " B"]]:
    """One pass.

    Args:
        graph, state: the model.
        seen: all but the tokens of this pass; the certain ones are added.
        tokens: certain ones, a draft, padding.
        certain: how many are certain; 0 for a prompt that takes no part.
        drafted: whether a draft stands behind them.

    Returns:
        What was seen; the first choice after the last certain token, and after the draft; whether the draft is the
        first choice, so that the second one counts too; and the draft of the token after those that count.
    """
    model = nnx.merge(graph, state)
    streams, cache = model.advance(tokens, seen.model, count=certain + drafted, keep=certain, taps=Taps())
    last = jnp.maximum(certain - 1, 0)
    both = jnp.stack([last, last + 1], axis=1)
    chosen = jnp.argmax(model.logits(_taken(streams, both), Taps()), axis=-1).astype(jnp.int32)
    accepted = drafted & (chosen[:, 0] == _taken(tokens, certain[:, None])[:, 0])

    # The stage's tokens are pairs: each token of this pass, and the one that is now known to follow it.
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    following = following.at[jnp.arange(len(tokens))[:, None], both].set(chosen)
    logits, stage = model.draft(
        streams,
        following,
        _positions(seen.model, tokens),
        only=last + accepted,
        past=Past(seen.stage, seen.model.tokens, certain + accepted, certain),
    )
    assert stage is not None
    return Seen(cache, stage), chosen, accepted, jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)


def _positions(cache: Cache, tokens: Int[Array, "B S"]) -> Int[Array, "B S"]:
    return (cache.first + cache.tokens)[:, None] + jnp.arange(tokens.shape[1])


def _taken(rows: Shaped[Array, "B S *rest"], at: Int[Array, "B Y"]) -> Shaped[Array, "B Y *rest"]:
    """Of every prompt the rows of some of its tokens."""
    return jnp.take_along_axis(rows, at.reshape(*at.shape, *(1,) * (rows.ndim - 2)), axis=1)
