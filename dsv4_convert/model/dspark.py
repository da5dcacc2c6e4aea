"""DSpark: three window-only blocks that together draft the next tokens, from the streams of some backbone layers.

Shape letters: ``B`` batch, ``S`` tokens whose streams are read, ``T`` target layers, ``Q`` tokens of the drafted block,
``N`` streams, ``D`` width, ``H`` heads, ``C`` head width, ``P`` tokens of a window, ``V`` vocabulary, ``R`` rank of the
Markov head.

1. The streams that leave the T target layers, in V4.1 those that enter them, are averaged, concatenated, projected and
   normalised: c = main_norm(main_proj([mean_n h_1, ..., mean_n h_T])). Each block makes keys of c for the tokens that
   are known.
2. The drafted block starts with the embeddings of one known token, the anchor, and of Q - 1 noise tokens. Every token
   of the block sees the keys of the window before the anchor and of the whole block, also of its later tokens.
3. The collapsed streams x_i give logits head(norm(x_i)) + markov_w2 markov_w1[t_i], where t_i is the token before:
   the anchor for i = 0, then the token drafted last. Tokens are chosen one after the other, in one pass.
4. confidence_i = proj [x_i, markov_w1[t_i]] is the logit of the draft being accepted, if those before it are.

A stage is a window-only block of its architecture. This module has V4's, :mod:`dsv4_convert.model.v41.dspark` V4.1's.

Source: published inference code of V4-Flash-0731 and of V4.1, ``DSparkBlock`` and ``Transformer.forward_spec``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv4_convert.model.attention import (
    KERNEL_KEYS,
    Attention,
    Earlier,
    Entries,
    WindowedAttention,
    attend,
    attend_as_released,
)
from dsv4_convert.model.axes import shard_map
from dsv4_convert.model.block import Block, DecoderBlock
from dsv4_convert.model.cache import Past, latest
from dsv4_convert.model.norm import rms_norm
from dsv4_convert.model.numerics import PLAIN, Numerics
from dsv4_convert.model.ops import linear, parameter
from dsv4_convert.model.recording import Taps
from dsv4_convert.model.rope import frequencies
from dsv4_convert.spec.config import Config, DSpark
from dsv4_convert.spec.v4.config import V4Config
from dsv4_convert.spec.v4.kinds import AttentionKind


class Drafted(NamedTuple):
    """Drafted tokens, the logits that they were chosen from, and the logits of their acceptance (DSpark's only)."""

    tokens: Int[Array, "B Q"]
    logits: Float[Array, "B Q V"]
    confidence: Float[Array, "B Q"] | None


class BlockAttention(WindowedAttention):
    """Attention in which every query sees the whole block, and the window of known tokens before it.

    A subclass is an attention without compressed entries, too.
    """

    def keys(self, x: Float[Array, "B S D"], positions: Int[Array, "B S"], taps: Taps) -> Float[Array, "B S C"]:
        """The rotated keys of known tokens, which are their values too."""
        return self._keys(x, positions, frequencies(self.config, compressed=False), taps)

    def _gathered(
        self, q: Float[Array, "B Q H C"], kv: Float[Array, "B Q C"], earlier: Earlier | None, entries: Entries
    ) -> Float[Array, "B Q H C"]:
        """The values that every query gathers. There are no compressed entries."""
        assert earlier is not None
        return _block_context(q, kv, earlier, self.attn_sink[...], numerics=self.numerics)


@shard_map()
def _block_context(
    q: Float[Array, "B Q H C"],
    kv: Float[Array, "B Q C"],
    earlier: Earlier,
    sink: Float[Array, " H"],
    *,
    numerics: Numerics,
) -> Float[Array, "B Q H C"]:
    batch, block, window = len(q), kv.shape[1], earlier.keys.shape[1]
    keys = jnp.concatenate([earlier.keys, kv], axis=1)
    known = earlier.tokens[:, None]
    token = known + jnp.arange(window) - window  # index in the prompt
    inside = jnp.concatenate([token >= 0, jnp.ones((batch, block), bool)], axis=1)
    seen = jnp.broadcast_to(inside[:, None], (batch, block, window + block))
    if not numerics.release:
        return attend(q, (keys,), seen, sink)
    # The published code keeps the window as a ring, and puts the block behind the places of its tokens.
    places = jnp.concatenate([token % window, jnp.minimum(known, window) + jnp.arange(block)], axis=1)
    return attend_as_released(q, (keys,), seen, sink, jnp.broadcast_to(places[:, None] // KERNEL_KEYS, seen.shape))


class V4BlockAttention(BlockAttention, Attention):
    """Attention of a block of V4."""


class MarkovHead(nnx.Module):
    """Logits that depend on the token before alone: a table of rank R."""

    def __init__(self, config: Config, rank: int) -> None:
        self.markov_w1 = parameter("vocab whole_rank", config.vocab_size, rank)
        self.markov_w2 = parameter("whole_rank vocab", rank, config.vocab_size)

    def embed(self, token_ids: Int[Array, "B *Q"]) -> Float[Array, "B *Q R"]:
        """The row of each token."""
        return self.markov_w1[...][token_ids]

    def __call__(self, embedded: Float[Array, "B *Q R"]) -> Float[Array, "B *Q V"]:
        """Logits of the token after, float32."""
        return linear(embedded.astype(jnp.float32), self.markov_w2[...])


class ConfidenceHead(nnx.Module):
    """The logit of a drafted token being accepted."""

    def __init__(self, config: Config, rank: int) -> None:
        self.proj = parameter("whole_width mix", config.hidden_size + rank, 1)

    def __call__(self, x: Float[Array, "B Q D"], embedded: Float[Array, "B Q R"]) -> Float[Array, "B Q"]:
        """From the collapsed streams before their norm, and the Markov head's row of the token before; float32."""
        both = jnp.concatenate([x, embedded.astype(x.dtype)], axis=-1)
        return linear(both.astype(jnp.float32), self.proj[...])[..., 0]


class DSparkBlock(DecoderBlock):
    """One of the blocks. The first also makes the context that all of them read; the last also chooses the tokens.

    A subclass is a window-only block of its architecture, too. It extends that block instead of holding one, since its
    parameters have the published names, ``mtp.0.attn.wq_a``. It has ``entering``: what the block before leaves, through
    the taps of what a block reads.
    """

    config: Config
    numerics: Numerics
    entering: Callable[..., Any]

    def add_ends(self, stage: int) -> None:
        """The parameters that the first and the last block have more than a layer."""
        config = self.config
        assert config.dspark is not None
        self.block_size = config.dspark.block_size
        width, rank = config.hidden_size, config.dspark.markov_rank
        self.first, self.last = stage == 0, stage == config.num_mtp_stages - 1
        if self.first:
            targets = len(config.dspark.target_layer_ids)
            self.main_proj = parameter("width whole_width", targets * width, width)
            self.main_norm = parameter("whole_width", width)
        if self.last:
            self.norm = parameter("whole_width", width)
            self.markov_head = MarkovHead(config, rank)
            self.confidence_head = ConfidenceHead(config, rank)

    def context(self, features: Float[Array, "B S T N D"], taps: Taps) -> Float[Array, "B S D"]:
        """The projected streams of the target layers."""
        features = taps("targets", features)
        means = jnp.mean(features.astype(jnp.float32), axis=3).astype(features.dtype)
        means = taps("main", means.reshape(*means.shape[:2], -1))
        projected = taps("main_proj", self.numerics.linear(means, self.main_proj.get_value()))
        return taps("main_norm", rms_norm(projected, self.main_norm[...], self.config.rms_norm_eps))

    def refine(
        self,
        carry: Any,
        token_ids: Int[Array, "B Q"],
        context: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        past: Past[Any],
        taps: Taps,
    ) -> tuple[Any, Any]:
        """The block's carry after this stage, and the stage's new state.

        Args:
            carry, token_ids: of the drafted block.
            context, positions: of the known tokens of this call; ``past`` counts them. The block follows the last one.
        """
        seen, after = self.remember(context, positions, past, taps)
        carry, _ = self(carry, token_ids, self.places(positions, past), taps, seen)
        return carry, after

    def remember(
        self, context: Float[Array, "B S D"], positions: Int[Array, "B S"], past: Past[Any], taps: Taps
    ) -> tuple[Past[Any], Any]:
        """The keys that the block sees of the known tokens, and the stage's new state. Arguments as for refine."""
        size = self.config.sliding_window
        keys = self.attn.keys(context, positions, taps.within("attn.main."))
        rows = jnp.concatenate([past.cache.window, keys], axis=1)
        window = latest(rows, jnp.maximum(past.count - 1, 0), size)
        block = jnp.full_like(past.count, self.block_size)
        seen = Past(dataclasses.replace(past.cache, window=window), past.before + past.count, block)
        return seen, dataclasses.replace(past.cache, window=latest(rows, past.kept, size - 1))

    def places(self, positions: Int[Array, "B S"], past: Past[Any]) -> Int[Array, "B Q"]:
        """The positions of the block, which follows the last of the known tokens."""
        return positions[:, :1] + past.count[:, None] + jnp.arange(self.block_size)

    def choose(
        self, x: Float[Array, "B Q D"], logits: Float[Array, "B Q V"], anchor: Int[Array, " B"], taps: Taps
    ) -> Drafted:
        """The block's tokens, one after the other, from its collapsed streams and the output head's logits.

        Each token is chosen after the ones before it, replaced ones where the tap of the tokens is replaced.
        """
        head, given = self.markov_head, taps.override("tokens")
        before = [anchor]
        for at in range(x.shape[1] - 1):
            chosen = jnp.argmax(logits[:, at] + head(head.embed(before[-1])), axis=-1).astype(anchor.dtype)
            before.append(chosen if given is None else given[:, at, 0])
        embedded = taps("markov_head.embed", head.embed(jnp.stack(before, axis=1)))
        logits = taps("draft_logits", logits + taps("markov_head", head(embedded)))
        tokens = taps("tokens", jnp.argmax(logits, axis=-1, keepdims=True).astype(jnp.int32))
        return Drafted(tokens[..., 0], logits, taps("confidence", self.confidence_head(x, embedded)))


class V4DSparkBlock(DSparkBlock, Block):
    """A block of V4. The last one collapses its streams by parameters of its own."""

    def __init__(self, config: V4Config, stage: int, numerics: Numerics = PLAIN, *, with_experts: bool = True) -> None:
        super().__init__(config, AttentionKind.SLIDING, hashed=False, with_experts=with_experts, numerics=numerics)
        self.numerics = numerics
        self.attn = V4BlockAttention(config, AttentionKind.SLIDING, numerics)
        self.add_ends(stage)
        if self.last:
            streams, width = config.hc_mult, config.hidden_size
            self.hc_head_fn = parameter("mix streams", streams, streams * width)
            self.hc_head_base = parameter("mix", streams)
            self.hc_head_scale = parameter("mix", 1)

    @staticmethod
    def entering(streams: Float[Array, "B Q N D"], taps: Taps) -> Float[Array, "B Q N D"]:
        """The streams that leave the block before."""
        return taps("streams", streams)


def block_ids(anchor: Int[Array, " B"], dspark: DSpark) -> Int[Array, "B Q"]:
    """The ids of a drafted block before it is drafted: the anchor, and noise."""
    noise = jnp.full((len(anchor), dspark.block_size - 1), dspark.noise_token_id, anchor.dtype)
    return jnp.concatenate([anchor[:, None], noise], axis=1)
