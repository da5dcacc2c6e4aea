"""The compressor: every r tokens become one entry (paper sections 2.3.1 and 2.3.2).

Shape letters: ``B`` batch, ``S`` tokens, ``T`` = S // r complete blocks, ``r`` tokens per block, ``D`` model width,
``C`` width of an entry, ``W`` width of the projections: C, or 2C where neighbouring blocks overlap.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv4_convert.model.norm import rms_norm
from dsv4_convert.model.parameters import linear, parameter
from dsv4_convert.model.recording import Taps
from dsv4_convert.model.rope import rotate


class Compressor(nnx.Module):
    """Pools blocks of tokens by a softmax gate per channel.

    With values C = x wkv, gates Z = x wgate + ape and block b of r tokens, entry b is
    ``norm(sum_j softmax_j(Z)_j * C_j)``, turned to the position of the block's first token. Without overlap j runs
    over the block (HCA). With overlap (CSA and its indexer) each token has two value series: the first C channels
    serve the *next* block, the last C its own, and j runs over 2r rows; block 0 has no predecessor.

    Source: paper equations 9-12 and 20-23; published inference code, ``Compressor``.
    """

    def __init__(self, width: int, entry: int, ratio: int, entry_width: int, *, eps: float) -> None:
        overlap = 2 if entry_width == 2 * entry else 1
        if entry_width != overlap * entry:
            raise ValueError(f"a compressor of {entry} channels projects to {entry} or {2 * entry}, not {entry_width}")
        self.ratio = ratio
        self.overlap = overlap == 2
        self.eps = eps
        self.ape = parameter(ratio, entry_width)
        self.wkv = parameter(width, entry_width)
        self.wgate = parameter(width, entry_width)
        self.norm = parameter(entry)

    def __call__(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"], table: np.ndarray, taps: Taps
    ) -> Float[Array, "B T C"]:
        """The entries of all complete blocks; a rest of fewer than r tokens makes none."""
        values = taps("wkv", linear(x, self.wkv[...]))
        gates = taps("wgate", linear(x, self.wgate[...]))
        blocks = x.shape[1] // self.ratio
        pooled = taps("pooled", self._pool(self._blocked(values, blocks), self._blocked(gates, blocks)))
        normed = taps("norm", rms_norm(pooled, self.norm[...], self.eps))
        starts = positions[:, : blocks * self.ratio : self.ratio]
        return taps("entries", rotate(normed, starts, table))

    def _blocked(self, rows: Float[Array, "B S W"], blocks: int) -> Float[Array, "B T r W"]:
        return rows[:, : blocks * self.ratio].reshape(rows.shape[0], blocks, self.ratio, rows.shape[2])

    def _pool(self, values: Float[Array, "B T r W"], gates: Float[Array, "B T r W"]) -> Float[Array, "B T C"]:
        gates = gates.astype(jnp.float32) + self.ape[...]
        if self.overlap:
            values = _with_previous(values, 0.0)
            gates = _with_previous(gates, -jnp.inf)
        shares = jax.nn.softmax(gates, axis=2)
        return jnp.sum(values.astype(jnp.float32) * shares, axis=2).astype(values.dtype)


def _with_previous(rows: Float[Array, "B T r W"], nothing: float) -> Float[Array, "B T rows C"]:
    """Row layout of overlapping blocks: the previous block's first half of channels, then the block's own second."""
    for_next, own = jnp.split(rows, 2, axis=-1)
    previous = jnp.pad(for_next, ((0, 0), (1, 0), (0, 0), (0, 0)), constant_values=nothing)[:, : rows.shape[1]]
    return jnp.concatenate([previous, own], axis=2)
