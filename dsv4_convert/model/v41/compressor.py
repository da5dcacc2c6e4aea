"""The compressor of V4.1: every r tokens become one latent, of which an entry and an index key are made.

Shape letters: ``B`` batch, ``S`` tokens, ``T`` blocks of a call, ``r`` tokens per block, ``D`` model width, ``C`` width
of a latent, ``P`` rows of the tokens before.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsv4_convert.model.cache import Past, SourceCache, latest
from dsv4_convert.model.compressor import rows_from
from dsv4_convert.model.norm import rms_norm
from dsv4_convert.model.numerics import Numerics
from dsv4_convert.model.ops import linear, parameter
from dsv4_convert.model.recording import Taps
from dsv4_convert.spec.v41.config import V41Config


class Latents(NamedTuple):
    """The latents of the blocks that a call completes, neither rotated nor rounded.

    ``start``: position of a block's first token; ``block``: its number in the prompt. A block that is not ``complete``
    has a latent that means nothing.
    """

    values: Float[Array, "B T C"]
    start: Int[Array, "B T"]
    block: Int[Array, "B T"]
    complete: Bool[Array, "B T"]


class Pending(NamedTuple):
    """Values and gates of the last r - 1 tokens: a block that ends with the next token begins with these."""

    values: Float[Array, "B P C"]
    gates: Float[Array, "B P C"]


class LatentCompressor(nnx.Module):
    """Pools blocks of r tokens, which do not overlap, by a softmax gate per channel.

    The latent of block b is ``norm(sum_j softmax_j(x_j wgate) * (x_j wkv))`` over its tokens j. With r = 1 it is
    ``norm(x wkv)``, and there is no gate. There is no position bias.

    Source: published inference code of V4.1, ``Compressor``.
    """

    #: Blocks do not overlap.
    overlap = False

    def __init__(self, config: V41Config, ratio: int, numerics: Numerics) -> None:
        self.ratio = ratio
        self.eps = config.rms_norm_eps
        self.numerics = numerics
        self.wkv = parameter("width entry", config.hidden_size, config.head_dim)
        self.wgate = parameter("width entry", config.hidden_size, config.head_dim) if ratio > 1 else None
        self.norm = parameter("entry", config.head_dim)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        taps: Taps,
        past: Past[SourceCache] | None = None,
    ) -> tuple[Latents, Pending | None]:
        """The latents of all complete blocks; the last tokens make none if they are fewer than r.

        With a ``past``: the ceil(S / r) blocks that may have become complete, from the first that was not. The rows
        that later blocks need are returned too.
        """
        dtype, ratio = x.dtype, self.ratio
        x = x if self.wgate is None else self.numerics.wide(x)  # a release projects in float32 where it pools
        values = taps("wkv", linear(x, self.wkv[...]))
        gates = jnp.zeros_like(values) if self.wgate is None else taps("wgate", linear(x, self.wgate[...]))
        pending, before = None, jnp.zeros(len(x), jnp.int32)
        if past is None:
            blocks, seen = x.shape[1] // ratio, jnp.full(len(x), x.shape[1])
            values, gates = values[:, : blocks * ratio], gates[:, : blocks * ratio]
        else:
            before, blocks, seen = past.before, -(-x.shape[1] // ratio), past.before + past.count
            values = jnp.concatenate([past.cache.values, values], axis=1)
            gates = jnp.concatenate([past.cache.gates, gates], axis=1)
            pending = Pending(latest(values, past.kept, ratio - 1), latest(gates, past.kept, ratio - 1))
            first = ratio - 1 - before % ratio
            values, gates = (rows_from(rows, first, blocks * ratio) for rows in (values, gates))
        pooled = taps("pooled", self._pool(values, gates).astype(dtype))
        block = before[:, None] // ratio + jnp.arange(blocks)
        start = positions[:, :1] - before[:, None] + block * ratio
        latents = taps("norm", rms_norm(pooled, self.norm[...], self.eps))
        return Latents(latents, start, block, (block + 1) * ratio <= seen[:, None]), pending

    def _pool(self, values: Float[Array, "B X C"], gates: Float[Array, "B X C"]) -> Float[Array, "B T C"]:
        values, gates = (
            rows.astype(jnp.float32).reshape(len(rows), -1, self.ratio, rows.shape[2]) for rows in (values, gates)
        )
        return jnp.sum(values * jax.nn.softmax(gates, axis=2), axis=2)
