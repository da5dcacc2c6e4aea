"""What a layer keeps of the tokens before, so that a prompt can go on from where it stopped.

Every buffer has a fixed shape: one compiled program serves every step. The last rows of a projection are kept newest
last and shifted, not written in a ring: a few hundred kB per layer move with every step, and order is age.

Shape letters: ``B`` batch, ``P`` rows kept, ``S`` tokens of a call, ``C`` width of a key or an entry, ``W`` width of a
compressor's projections, ``T`` entries that there is room for, ``r`` tokens per block.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from dsv4_convert.config import Attention, Config
from dsv4_convert.model.numerics import PLAIN, Numerics
from dsv4_convert.model.segments import segments

_T = TypeVar("_T")
_U = TypeVar("_U")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compressed:
    """State of one compressor: the projections of the last tokens, and all entries.

    A block that ends in the next token begins r - 1 tokens before it; where blocks overlap, the one before it counts
    too. So ``P`` is r - 1, or 2r - 1 with overlap.
    """

    values: Float[Array, "*layer B P W"]
    gates: Float[Array, "*layer B P W"]
    entries: Float[Array, "*layer B T C"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """State of one layer: the keys of the last ``sliding_window - 1`` tokens, and of its compressors.

    Of scanned layers the state of several, stacked.
    """

    window: Float[Array, "*layer B P C"]
    compressor: Compressed | None
    indexer: Compressed | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """State of the model for a batch of prompts, which may be of different lengths.

    Attributes:
        layers: the state of each layer; of scanned layers (:class:`~dsv4_convert.model.layers.ScannedLayers`) that of
            each place of each segment's pattern, stacked.
        tokens: how many tokens of each prompt were seen.
        first: position of each prompt's first token in the rotary tables; 0 unless the prompt continues another.

    Examples:
        >>> model = restore_model(Weights.open(Path("orbax")))
        >>> cache = Cache.empty(model.config, batch=1, capacity=64)
        >>> logits, cache = model.extend(jnp.array([[3, 1, 4]]), cache)  # float32 [B, S, V]
    """

    layers: tuple[Any, ...]
    tokens: Int[Array, " B"]
    first: Int[Array, " B"]

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
        """Room for ``capacity`` tokens of each of ``batch`` prompts. What goes beyond is not kept, without a word."""

        def empty(kind: Attention) -> LayerCache:
            return empty_layer(config, kind, batch, capacity, dtype, numerics)

        def stacked(kind: Attention, count: int) -> LayerCache:
            return jax.tree.map(lambda part: jnp.zeros((count, *part.shape), part.dtype), empty(kind))

        layers: tuple[Any, ...] = (
            tuple(map(empty, config.attention))
            if not scanned
            else tuple(
                tuple(stacked(kind, segment.repeats) for kind, _ in segment.pattern) for segment in segments(config)
            )
        )
        return cls(
            layers,
            jnp.zeros(batch, jnp.int32),
            jnp.broadcast_to(jnp.asarray(first, jnp.int32), (batch,)),
        )

    @property
    def dtype(self) -> jnp.dtype:
        """That of keys and entries, and so of activations."""
        return jax.tree.leaves(self.layers)[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def empty_layer(
    config: Config, kind: Attention, batch: int, capacity: int, dtype: DTypeLike, numerics: Numerics = PLAIN
) -> LayerCache:
    """Nothing yet, with room for ``capacity`` tokens."""
    pooled = jnp.float32 if numerics.release else dtype

    def compressed(width: int) -> Compressed:
        ratio = config.ratio(kind)
        overlap = 2 if kind is Attention.CSA else 1
        rows = (batch, overlap * ratio - 1, overlap * width)
        # Not one array twice: a caller who donates the cache may give every buffer away once.
        return Compressed(
            jnp.zeros(rows, pooled), jnp.zeros(rows, pooled), jnp.zeros((batch, capacity // ratio, width), dtype)
        )

    return LayerCache(
        jnp.zeros((batch, config.sliding_window - 1, config.head_dim), dtype),
        None if kind is Attention.SLIDING else compressed(config.head_dim),
        compressed(config.index_head_dim) if kind is Attention.CSA else None,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past(Generic[_T]):
    """What a call goes on from: a cache, the tokens ``before`` it, and how many of its own ``count``; both ``[B]``.

    A prompt's tokens from ``count`` on are padding: they are computed, nothing sees them, and they are not kept. With
    ``keep`` ``[B]`` only the first so many are: the others see and are seen in this call alone. An entry of a block
    that they complete stays behind in the cache, where no query sees it before its block is complete; then it is
    written anew.
    """

    cache: _T
    before: Array
    count: Array
    keep: Array | None = None

    @property
    def kept(self) -> Array:
        """How many of the call's tokens the cache remembers."""
        return self.count if self.keep is None else self.keep

    def of(self, part: _U | None) -> Past[_U]:
        """The same for a part of the cache that is there."""
        assert part is not None
        return Past(part, self.before, self.count, self.keep)


def latest(rows: Shaped[Array, "B X *rest"], count: Int[Array, " B"], keep: int) -> Shaped[Array, "B P *rest"]:
    """The ``keep`` rows to keep of ``keep`` old ones followed by new ones, of which ``count`` are no padding."""

    def one(rows: Any, count: Any) -> Any:
        return jax.lax.dynamic_slice_in_dim(rows, count, keep)

    return jax.vmap(one)(rows, count)
