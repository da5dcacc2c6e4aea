"""The whole model, from tokens to logits, and its draft stages, of multi-token prediction or of DSpark.

Shape letters: ``B`` batch, ``S`` tokens, ``T`` layers that a draft reads, ``N`` streams, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from dsv4_convert.model.axes import all_gather, all_to_all, own_rows, psum, shard_map
from dsv4_convert.model.block import MTPBlock
from dsv4_convert.model.cache import Cache, LayerCache, Past
from dsv4_convert.model.dspark import Drafted, DSparkBlock, block_ids
from dsv4_convert.model.hyper_connection import head_collapse
from dsv4_convert.model.layers import layers_of, stage_of, through
from dsv4_convert.model.norm import rms_norm
from dsv4_convert.model.numerics import PLAIN, Numerics
from dsv4_convert.model.ops import linear, parameter
from dsv4_convert.model.recording import Taps
from dsv4_convert.spec.config import Config, prefix_of
from dsv4_convert.spec.v4.config import V4Config

#: The input of a DSpark stage: the block's carry and the context ``[B, S, D]``. The first one gets no carry, and the
#: streams of the target layers ``[B, S, T, N, D]``.
StageInput: TypeAlias = tuple[Any, Float[Array, "B S *rest"]]
#: Logical axes of the output head.
HEAD_AXES = "width vocab"
#: The tap of the streams that leave a layer, by its name within the layer.
_STREAMS = "hc_ffn.streams"


class Decoder(nnx.Module):
    """A model of the family, from tokens to logits.

    1. The token's embedding is copied into N streams; it is not scaled.
    2. Every layer mixes its attention and its experts into the streams, and hands the next one its *carry*.
    3. The streams collapse to one, which is normalised and multiplied with the output head.

    A subclass has ``enter`` (the carry of layer 0 from the streams), ``leave`` (the input of the head from the carry of
    the last layer) and ``collapse`` (one stream of the head's input, by the parameters ``head_weights``; the tap of the
    result is ``collapsed``). A carry has names, those of the taps whose values it is made of: ``carry_of`` makes it of
    these, ``taps_of`` gives them back.

    The forward pass does not use the stages in ``mtp``; :meth:`propose` drafts tokens with them, whichever they are.
    """

    head_weights: ClassVar[tuple[str, ...]] = ()
    collapsed: ClassVar[str]
    enter: Callable[..., Any]
    leave: Callable[..., Any]
    collapse: Callable[..., Float[Array, "B S D"]]
    carry_of: Callable[..., Any]
    taps_of: Callable[..., dict[str, Array]]

    def __init__(self, config: Config, numerics: Numerics, *, scanned: bool) -> None:
        """``scanned``: layers of one kind share a program, and their weights are stacked."""
        self.config = config
        self.numerics = numerics
        width = config.hidden_size
        self.embed = parameter("vocab width", config.vocab_size, width)
        self.layers = layers_of(config, numerics, scanned=scanned)
        self.norm = parameter("whole_width", width)
        self.head = parameter(HEAD_AXES, width, config.vocab_size)
        stages = range(config.num_mtp_stages)
        self.mtp = nnx.List([stage_of(config, stage, numerics=numerics) for stage in stages])

    @property
    def why_no_drafts(self) -> str | None:
        """Why the model cannot draft tokens, for messages; None if it can."""
        return None if len(self.mtp) else "this model has no draft stage (mtp or DSpark) to draft tokens with"

    def __call__(
        self,
        token_ids: Int[Array, "B S"],
        *,
        positions: Int[Array, "B S"] | None = None,
        dtype: DTypeLike = jnp.float32,
        taps: Taps | None = None,
    ) -> Float[Array, "B S V"]:
        """Logits of every position, float32. Activations have ``dtype``."""
        taps = taps or Taps()
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1]), token_ids.shape)
        streams = embed(self.embed[...], token_ids, self.config.hc_mult, dtype, taps)
        carry, _ = through(self.layers, self.enter(streams), token_ids, positions, taps)
        return self.logits(self.leave(carry), taps)

    @classmethod
    def entering_of(cls, taps: Mapping[str, Any], dtype: DTypeLike) -> Any:
        """These taps as what enters a layer or stage: the carry, and for a stage of DSpark the context beside."""
        if (targets := taps.get("targets")) is not None:
            return None, jnp.asarray(targets, dtype)
        carry, context = cls.carry_of(taps, dtype), taps.get("main_norm")
        return carry if context is None else (carry, jnp.asarray(context, dtype))

    def extend(
        self,
        token_ids: Int[Array, "B S"],
        cache: Cache,
        *,
        count: Int[Array, " B"] | None = None,
        keep: Int[Array, " B"] | None = None,
        last_only: bool = False,
        taps: Taps | None = None,
    ) -> tuple[Float[Array, "B Y V"], Cache]:
        """Logits of the next tokens of prompts whose tokens before are in the cache, and the cache with these too.

        One call with a whole prompt on an empty cache gives the same as calls with its parts or one call per token.
        Shapes do not depend on how many tokens the cache has seen, so steps of one length are one compiled program.
        Activations have the cache's dtype.

        Args:
            token_ids: the next ``S`` tokens of each prompt.
            cache: the tokens before (:meth:`Cache.empty`). The logits of tokens that do not fit are NaN.
            count: how many of the ``S`` are tokens; the others are padding, whose logits mean nothing. None for all.
                A prompt may get none.
            keep: how many of the ``count`` the cache remembers; the next call continues after these. None for all.
            last_only: only the logits of each prompt's last token, ``Y = 1``.
            taps: records activations.

        Raises:
            UsageError: tokens do not fit, and the call is not inside ``jax.jit`` (:meth:`Cache.refuse_overflow`).
        """
        taps = taps or Taps()
        count = jnp.full(token_ids.shape[0], token_ids.shape[1], jnp.int32) if count is None else count
        leaving, cache = self.advance(token_ids, cache, count=count, keep=keep, taps=taps)
        if last_only:
            leaving = jax.tree.map(lambda rows: row_of(rows, jnp.maximum(count - 1, 0)), leaving)
        return self.logits(leaving, taps), cache

    def advance(
        self,
        token_ids: Int[Array, "B S"],
        cache: Cache,
        *,
        count: Int[Array, " B"],
        keep: Int[Array, " B"] | None = None,
        taps: Taps,
    ) -> tuple[Any, Cache]:
        """:meth:`extend` without the head: what leaves the last layer."""
        cache.refuse_overflow(count)
        keep = count if keep is None else keep
        positions = (cache.first + cache.tokens)[:, None] + jnp.arange(token_ids.shape[1])
        streams = embed(self.embed[...], token_ids, self.config.hc_mult, cache.dtype, taps)
        past = Past(cache.layers, cache.tokens, count, keep)
        carry, layers = through(self.layers, self.enter(streams), token_ids, positions, taps, past)
        token = jnp.arange(token_ids.shape[1])
        overflow = (cache.tokens[:, None] + token >= cache.capacity) & (token < count[:, None])
        leaving = jax.tree.map(lambda rows: jnp.where(_beside(overflow, rows), jnp.nan, rows), self.leave(carry))
        return leaving, dataclasses.replace(cache, layers=layers, tokens=cache.tokens + keep)

    def logits(self, entering: Any, taps: Taps, stage: Any = None) -> Float[Array, "B S V"]:
        """Logits of what enters the head after the last layer, or after a ``stage``, which has a head of its own."""
        own = stage or self
        weights = tuple(getattr(own, name)[...] for name in (*self.head_weights, "norm"))
        return self.project(entering, (*weights, self.head[...]), self.config, taps)

    @classmethod
    def project(
        cls, entering: Any, weights: Sequence[Float[Array, "..."]], config: Config, taps: Taps
    ) -> Float[Array, "B S V"]:
        """The head by its ``weights``: those in :attr:`head_weights`, the final norm, and the output matrix."""
        *own, norm, matrix = weights
        return output(cls.collapse(entering, own, config, taps), norm, matrix, config, taps)

    def reading_drafts(self) -> Taps:
        """The taps that :meth:`propose` reads of a call of :meth:`advance`."""
        return Taps(frozenset(map(self._read, self.config.draft_sources)).__contains__)

    def _read(self, layer: int) -> str:
        """The tap of the streams of a layer that the stages read."""
        return f"{self.config.prefix(layer)}{self.config.draft_tap(layer)}"

    def propose(
        self,
        recorded: Taps,
        following: Int[Array, "B S"],
        first: Int[Array, " B"],
        past: Past[tuple[Any, ...]],
        taps: Taps | None = None,
    ) -> tuple[Drafted, tuple[Any, ...]]:
        """Draft the tokens after the next, and the stages' new states.

        Args:
            recorded: :meth:`reading_drafts` after a call of :meth:`advance` with ``S`` tokens of each prompt.
            following: the token that follows each of these; the last ``past`` counts of them is the next token.
            first: position of each prompt's first token.
            past: the states of all stages.
            taps: records activations, below ``mtp.0.`` and so on.
        """
        taps = taps or Taps()
        positions = (first + past.before)[:, None] + jnp.arange(following.shape[1])
        last = jnp.maximum(past.count - 1, 0)
        features = [recorded.values[self._read(layer)] for layer in self.config.draft_sources]
        if self.config.dspark is not None:
            anchor = jnp.take_along_axis(following, last[:, None], axis=1)[:, 0]
            return self._draft_block(jnp.stack(features, axis=2), anchor, positions, past, taps)
        own = past.of(past.cache[0])
        logits, state = self.draft(features[0], following, positions, only=last, taps=taps, past=own)
        assert state is not None
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return Drafted(tokens, logits, None), (state, *past.cache[1:])

    def _draft_block(
        self,
        features: Float[Array, "B S T N D"],
        anchor: Int[Array, " B"],
        positions: Int[Array, "B S"],
        past: Past[tuple[Any, ...]],
        taps: Taps,
    ) -> tuple[Drafted, tuple[Any, ...]]:
        """A block of DSpark's, which begins with the ``anchor``, the token after the last of the call."""
        assert self.config.dspark is not None
        ids, states = block_ids(anchor, self.config.dspark), []
        entering: StageInput = (None, features)
        for stage, state in enumerate(past.cache):
            own = taps.within(prefix_of(None, stage))
            entering, drafted, state = self.draft_stage(stage, entering, ids, positions, past.of(state), own)
            states.append(state)
        assert drafted is not None
        return drafted, tuple(states)

    def draft_stage(
        self,
        stage: int,
        entering: StageInput,
        ids: Int[Array, "B Q"],
        positions: Int[Array, "B S"],
        past: Past[Any],
        taps: Taps,
    ) -> tuple[tuple[Any, Float[Array, "B S D"]], Drafted | None, Any]:
        """One stage of DSpark's: what enters the next one, the draft if it is the last one, and its new state.

        Args:
            stage: its place in ``mtp``.
            entering: what the stage before hands on, and the context; the first stage makes both, of the streams of
                the target layers.
            ids: of the block.
            positions: of the known tokens.
            past: the stage's own.
            taps: of the stage.
        """
        block = cast(DSparkBlock, self.mtp[stage])
        rows = _rows_of(self.embed[...], ids) if block.first else None
        carry, context = self.enter_stage(block, entering, rows, taps)
        carry, state = block.refine(carry, ids, context, positions, past, taps)
        if not block.last:
            return (carry, context), None, state
        x = self.collapse(carry, [getattr(block, name)[...] for name in self.head_weights], self.config, taps)
        logits = output(x, block.norm[...], self.head[...], self.config, taps)
        return (carry, context), block.choose(x, logits, ids[:, 0], taps), state

    @classmethod
    def enter_stage(
        cls, block: DSparkBlock, entering: StageInput, rows: Float[Array, "B Q D"] | None, taps: Taps
    ) -> tuple[Any, Float[Array, "B S D"]]:
        """The carry of a block with which a stage of DSpark's begins, and the context. ``rows``: the first one's
        embeddings."""
        carry, context = entering
        if carry is not None:
            return block.entering(carry, taps), taps("context", context)
        assert rows is not None
        context = block.context(context, taps)
        return cls.enter(copied(rows.astype(context.dtype), block.config.hc_mult, taps)), context

    def draft(
        self,
        streams: Float[Array, "B S N D"],
        next_ids: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        *,
        stage: int = 0,
        only: Int[Array, " B"] | None = None,
        taps: Taps | None = None,
        past: Past[LayerCache] | None = None,
    ) -> tuple[Float[Array, "B Y V"], LayerCache | None]:
        """Logits of the token after the next, by an mtp stage; with a ``past`` the stage's new state too.

        Args:
            streams: output streams of the last layer, or of the previous stage, at each token.
            next_ids: the token that follows each of them.
            positions: positions of the streams' tokens.
            stage: index of the stage.
            only: index of one token of each prompt; only its logits are computed, ``Y = 1``. None for all tokens.
            taps: records activations, below ``mtp.0.``.
            past: the stage's state. One of its tokens is a pair: the streams, and the id of the next token.
        """
        taps = (taps or Taps()).within(prefix_of(None, stage))
        block = cast(MTPBlock, self.mtp[stage])
        embedded = self.embed[...][next_ids].astype(streams.dtype)
        streams, after = block.predict(streams, embedded, next_ids, positions, taps, past)
        if only is not None:
            streams = row_of(streams, only)
        return self.logits(streams, taps, block), after


class Model(Decoder):
    """DeepSeek-V4.

    Source: paper section 2; published inference code, ``Transformer``.

    Examples:
        >>> model = restore_model(Weights.open(Path("orbax")))
        >>> model(jnp.array([[3, 1, 4]])).shape  # logits [B, S, V]
        (1, 3, 96)
    """

    head_weights = ("hc_head_fn", "hc_head_base", "hc_head_scale")
    collapsed = "hc_head"

    def __init__(self, config: V4Config, numerics: Numerics = PLAIN, *, scanned: bool = False) -> None:
        """``scanned``: layers of one kind share a program, and their weights are stacked."""
        super().__init__(config, numerics, scanned=scanned)
        streams, width = config.hc_mult, config.hidden_size
        self.hc_head_fn = parameter("mix streams", streams, streams * width)
        self.hc_head_base = parameter("mix", streams)
        self.hc_head_scale = parameter("mix", 1)

    @staticmethod
    def enter(streams: Float[Array, "B S N D"]) -> Float[Array, "B S N D"]:
        """The carry of layer 0, which is the streams alone."""
        return streams

    @staticmethod
    def leave(streams: Float[Array, "B S N D"]) -> Float[Array, "B S N D"]:
        """The input of the head: the streams that leave the last layer."""
        return streams

    @staticmethod
    def carry_of(taps: Mapping[str, Any], dtype: DTypeLike) -> Float[Array, "B S N D"]:
        """The carry that is made of these taps."""
        return jnp.asarray(taps[_STREAMS], dtype)

    @staticmethod
    def taps_of(streams: Float[Array, "B S N D"]) -> dict[str, Array]:
        """The taps that a carry is made of."""
        return {_STREAMS: streams}

    @staticmethod
    def collapse(
        streams: Float[Array, "B S N D"], weights: Sequence[Float[Array, "..."]], config: Config, taps: Taps
    ) -> Float[Array, "B S D"]:
        """The one stream that the head reads."""
        fn, base, scale = weights
        return head_collapse(streams, fn, base, scale, config, taps)


def row_of(rows: Float[Array, "B S *rest"], index: Int[Array, " B"]) -> Float[Array, "B 1 *rest"]:
    """One token of each prompt."""
    return jnp.take_along_axis(rows, _beside(index[:, None], rows), axis=1)


def _beside(flags: Shaped[Array, "B X"], rows: Float[Array, "B S *rest"]) -> Shaped[Array, "B X *ones"]:
    """With as many axes as ``rows``."""
    return flags.reshape(*flags.shape, *(1,) * (rows.ndim - 2))


def embed(
    table: Float[Array, "V D"], token_ids: Int[Array, "B S"], streams: int, dtype: DTypeLike, taps: Taps
) -> Float[Array, "B S N D"]:
    """The embedding of every token, copied into all streams."""
    return copied(_rows_of(table, token_ids).astype(dtype), streams, taps)


def copied(rows: Float[Array, "B S D"], streams: int, taps: Taps) -> Float[Array, "B S N D"]:
    """Embeddings, copied into all streams."""
    rows = taps("embed", rows)
    return jnp.broadcast_to(rows[:, :, None], (*rows.shape[:2], streams, rows.shape[2]))


@shard_map(P="width")
def _rows_of(table: Float[Array, "V P"], token_ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """Rows of a table. A device with a part ``P`` of the width looks up the ids of all, who exchange parts of rows."""
    rows = psum(own_rows(table, all_gather(token_ids, "width"), "vocab"), "vocab")
    return all_to_all(rows, "width", split_axis=0, concat_axis=2)


def output(
    x: Float[Array, "B S D"], norm: Float[Array, " D"], weight: Float[Array, "D V"], config: Config, taps: Taps
) -> Float[Array, "B S V"]:
    """Norm and output head of collapsed streams: norm(x) W, in float32 whatever the activations' dtype."""
    x = taps("norm", rms_norm(x, norm, config.rms_norm_eps))
    return taps("logits", linear(x.astype(jnp.float32), weight))
