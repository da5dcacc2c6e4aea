"""The state of a layer after the tokens of a prompt, from which the next tokens continue.

Every buffer has a fixed shape: one compiled program serves every step. Buffers of a projection's last rows shift at
every step, newest last, instead of being rings: that moves a few hundred kB per layer, and order is age.

Shape letters: ``B`` batch, ``P`` rows kept, ``S`` tokens of a call, ``C`` width of a key or an entry, ``W`` width of a
compressor's projections, ``T`` capacity in entries, ``r`` tokens per block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from dsv4_convert.errors import UsageError
from dsv4_convert.model.numerics import PLAIN, Numerics
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.segments import segments
from dsv4_convert.spec.v4.config import V4Config
from dsv4_convert.spec.v4.kinds import AttentionKind
from dsv4_convert.spec.v41.config import V41Config
from dsv4_convert.spec.v41.kinds import LayerKind

_T = TypeVar("_T")
_U = TypeVar("_U")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compressed:
    """State of one compressor: the projections of the last tokens, and all entries.

    A block that ends with the next token begins r - 1 tokens before it, and with overlap needs the block before it too.
    So ``P`` is r - 1, or 2r - 1 with overlap.
    """

    values: Float[Array, "*layer B P W"]
    gates: Float[Array, "*layer B P W"]
    entries: Float[Array, "*layer B T C"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """State of one layer: the keys of the last ``sliding_window - 1`` tokens, and the state of its compressors.

    Scanned layers stack the state of several.
    """

    window: Float[Array, "*layer B P C"]
    compressor: Compressed | None
    indexer: Compressed | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourceCache:
    """State of a layer of V4.1 that compresses the past for itself and others: entries, index keys, and the projections
    of the last r - 1 tokens."""

    values: Float[Array, "*layer B P C"]
    gates: Float[Array, "*layer B P C"]
    entries: Float[Array, "*layer B T C"]
    keys: Float[Array, "*layer B T Ci"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class V41LayerCache:
    """State of one layer of V4.1: the keys of the last ``sliding_window - 1`` tokens, and what some layers have more.

    ``recent``: ids of the last tokens, of which an engram makes n-grams; -1 before the first token.
    """

    window: Float[Array, "*layer B P C"]
    source: SourceCache | None
    recent: Int[Array, "*layer B L"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """State of the model for a batch of prompts, which may be of different lengths.

    Attributes:
        layers: the state of each layer. Scanned layers (:class:`~dsv4_convert.model.layers.ScannedLayers`) have one
            stacked state for each place of each segment's pattern.
        tokens: how many tokens of each prompt the model has seen.
        first: position of each prompt's first token in the rotary tables; 0 unless the prompt continues another.
        capacity: how many tokens of each prompt fit; :meth:`refuse_overflow` checks it.

    Examples:
        >>> model = restore_model(Weights.open(Path("orbax")))
        >>> cache = Cache.empty(model.config, batch=1, capacity=64)
        >>> logits, cache = model.extend(jnp.array([[3, 1, 4]]), cache)  # float32 [B, S, V]
    """

    layers: tuple[Any, ...]
    tokens: Int[Array, " B"]
    first: Int[Array, " B"]
    capacity: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(
        cls,
        config: Config,
        batch: int,
        capacity: int,
        *,
        dtype: DTypeLike = jnp.float32,
        first: ArrayLike = 0,
        numerics: Numerics = PLAIN,
        scanned: bool = False,
    ) -> Cache:
        """A cache for ``capacity`` tokens of each of ``batch`` prompts."""

        def empty(kind: Any) -> Any:
            return empty_layer(config, kind, batch, capacity, dtype, numerics)

        def stacked(kind: Any, count: int) -> Any:
            return jax.tree.map(lambda part: jnp.stack([part] * count), empty(kind))

        layers: tuple[Any, ...] = (
            tuple(empty(config.layer_kind(layer)) for layer in range(config.num_hidden_layers))
            if not scanned
            else tuple(
                tuple(stacked(kind, segment.repeats) for kind in segment.pattern) for segment in segments(config)
            )
        )
        return cls(
            layers,
            jnp.zeros(batch, jnp.int32),
            jnp.broadcast_to(jnp.asarray(first, jnp.int32), (batch,)),
            capacity,
        )

    def refuse_overflow(self, count: ArrayLike = 0) -> None:
        """Raise if a prompt has more tokens than fit, once ``count`` more have come.

        Inside ``jax.jit`` the numbers are not known, and this does nothing. :meth:`Model.extend` computes NaN for the
        tokens that do not fit, and this method, called on the cache that it returns, says why.

        Raises:
            UsageError: naming the prompt, its tokens and the capacity.
        """
        if isinstance(self.tokens, jax.core.Tracer) or isinstance(count, jax.core.Tracer):
            return
        tokens = np.asarray(self.tokens) + np.asarray(count)
        if (too_long := np.flatnonzero(tokens > self.capacity)).size:
            row = int(too_long[0])
            raise UsageError(
                f"the cache holds {self.capacity} tokens of each prompt, and prompt {row} has {tokens[row]}: the "
                f"logits of the last {tokens[row] - self.capacity} are NaN; make it with Cache.empty(…, "
                f"capacity={tokens.max()}) or more"
            )

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of keys and entries, and so of activations."""
        return jax.tree.leaves(self.layers)[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def empty_layer(
    config: Config, kind: Any, batch: int, capacity: int, dtype: DTypeLike, numerics: Numerics = PLAIN
) -> Any:
    """The state of a layer of this kind before the first token, with a capacity of ``capacity`` tokens."""
    pooled = jnp.float32 if numerics.release else dtype
    window = jnp.zeros((batch, config.sliding_window - 1, config.head_dim), dtype)
    return _EMPTY[type(config)](config, kind, window, capacity, pooled)


def empty_stages(config: Config, batch: int, dtype: DTypeLike) -> tuple[Any, ...]:
    """The states of the draft stages before the first token. They have a window only."""
    return tuple(empty_layer(config, config.layer_kind(layer), batch, 0, dtype) for layer in config.stage_layers)


def _empty_v4(
    config: V4Config,
    kind: tuple[AttentionKind, bool],
    window: Float[Array, "B P C"],
    capacity: int,
    pooled: DTypeLike,
) -> LayerCache:
    batch, dtype = len(window), window.dtype
    attention, _ = kind

    def compressed(width: int) -> Compressed:
        ratio = config.ratio(attention)
        overlap = 2 if attention is AttentionKind.CSA else 1
        rows = (batch, overlap * ratio - 1, overlap * width)
        # Separate arrays, because a donated cache may give every buffer away only once.
        return Compressed(
            jnp.zeros(rows, pooled), jnp.zeros(rows, pooled), jnp.zeros((batch, capacity // ratio, width), dtype)
        )

    return LayerCache(
        window,
        None if attention is AttentionKind.SLIDING else compressed(config.head_dim),
        compressed(config.index_head_dim) if attention is AttentionKind.CSA else None,
    )


def _empty_v41(
    config: V41Config, kind: LayerKind, window: Float[Array, "B P C"], capacity: int, pooled: DTypeLike
) -> V41LayerCache:
    batch, dtype = len(window), window.dtype
    source = recent = None
    if kind.compresses:
        rows, entries = (batch, kind.ratio - 1, config.head_dim), (batch, capacity // kind.ratio)
        source = SourceCache(
            jnp.zeros(rows, pooled if kind.ratio > 1 else dtype),
            jnp.zeros(rows, pooled if kind.ratio > 1 else dtype),
            jnp.zeros((*entries, config.head_dim), dtype),
            jnp.zeros((*entries, config.index_head_dim), dtype),
        )
    if kind.engram is not None:
        assert config.engram is not None
        recent = jnp.full((batch, config.engram.max_ngram_size - 1), -1, jnp.int32)
    return V41LayerCache(window, source, recent)


_EMPTY: dict[type[Config], Callable[..., Any]] = {V4Config: _empty_v4, V41Config: _empty_v41}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past(Generic[_T]):
    """The state that a call continues from, and how many tokens it adds to each prompt.

    Attributes:
        cache: state after the tokens before.
        before: number of tokens before.
        count: number of tokens in this call. Tokens from ``count`` on are padding: they are computed, but no token sees
            them and the cache does not keep them.
        keep: number of tokens that the cache keeps (None: ``count``). The others see and are seen in this call only. If
            they complete a block, its entry stays in the cache, where no query sees it until the block is complete
            again; then it is overwritten.
    """

    cache: _T
    before: Int[Array, " B"]
    count: Int[Array, " B"]
    keep: Int[Array, " B"] | None = None

    @property
    def kept(self) -> Int[Array, " B"]:
        """How many of the call's tokens the cache keeps."""
        return self.count if self.keep is None else self.keep

    def of(self, part: _U | None) -> Past[_U]:
        """The same for a part of the cache, which must not be None."""
        assert part is not None
        return Past(part, self.before, self.count, self.keep)


def latest(rows: Shaped[Array, "B X *rest"], count: Int[Array, " B"], keep: int) -> Shaped[Array, "B P *rest"]:
    """The last ``keep`` rows of ``keep`` old ones followed by ``count`` new ones; padding after these is dropped."""

    def one(rows: Any, count: Any) -> Any:
        return jax.lax.dynamic_slice_in_dim(rows, count, keep)

    return jax.vmap(one)(rows, count)
