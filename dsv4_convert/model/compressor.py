"""The compressor: every r tokens become one entry (paper sections 2.3.1 and 2.3.2).

Shape letters: ``B`` batch, ``S`` tokens, ``T`` blocks, ``r`` tokens per block, ``D`` model width, ``C`` width of an
entry, ``W`` width of the projections: C, or 2C where neighbouring blocks overlap, ``P`` rows of the tokens before.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsv4_convert.model.cache import Compressed, Past, latest
from dsv4_convert.model.norm import rms_norm
from dsv4_convert.model.numerics import Numerics
from dsv4_convert.model.ops import linear, parameter
from dsv4_convert.model.recording import Taps
from dsv4_convert.model.rope import rotate


class Compressor(nnx.Module):
    """Pools blocks of tokens by a softmax gate per channel.

    With values C = x wkv, gates Z = x wgate + ape and block b of r tokens, entry b is
    ``norm(sum_j softmax_j(Z)_j * C_j)``, rotated by the position of the block's first token. Without overlap j runs
    over the block (HCA). With overlap (CSA and its indexer) each token has two value series: the first C channels
    serve the *next* block, the last C its own, and j runs over 2r rows; block 0 has no predecessor.

    Source: paper equations 9-12 and 20-23; published inference code, ``Compressor``.
    """

    def __init__(
        self, width: int, entry: int, ratio: int, entry_width: int, *, eps: float, indexed: bool, numerics: Numerics
    ) -> None:
        """``indexed``: the entries belong to an indexer, which scores them; else attention reads them."""
        overlap = 2 if entry_width == 2 * entry else 1
        if entry_width != overlap * entry:
            raise ValueError(f"a compressor of {entry} channels projects to {entry} or {2 * entry}, not {entry_width}")
        self.ratio = ratio
        self.overlap = overlap == 2
        self.eps = eps
        self.indexed = indexed
        self.numerics = numerics
        self.ape = parameter("block entry", ratio, entry_width)
        self.wkv = parameter("width entry", width, entry_width)
        self.wgate = parameter("width entry", width, entry_width)
        self.norm = parameter("entry", entry)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        table: np.ndarray,
        taps: Taps,
        past: Past[Compressed] | None = None,
    ) -> tuple[Float[Array, "B T C"], Compressed | None]:
        """The entries of all complete blocks; the last tokens make none if they are fewer than r.

        With a ``past`` there are as many entries as the cache has room for, those of complete blocks first, and the new
        state is returned too. Taps then record the ceil(S / r) blocks that may have become complete, from the first
        block that was not.
        """
        dtype, x = x.dtype, self.numerics.wide(x)
        values = taps("wkv", linear(x, self.wkv[...]))
        gates = taps("wgate", linear(x, self.wgate[...]))
        if past is not None:
            return self._continued(values, gates, positions, table, taps, past)
        whole = x.shape[1] // self.ratio * self.ratio
        pooled = self._pool(self._blocked(values[:, :whole]), self._blocked(gates[:, :whole]))
        return self._entries(pooled.astype(dtype), positions[:, : whole : self.ratio], table, taps), None

    def _continued(
        self,
        values: Float[Array, "B S W"],
        gates: Float[Array, "B S W"],
        positions: Int[Array, "B S"],
        table: np.ndarray,
        taps: Taps,
        past: Past[Compressed],
    ) -> tuple[Float[Array, "B T C"], Compressed]:
        """Pool cached and new rows, from the block of the first new token on (with overlap from the one before)."""
        state, before, count = past.cache, past.before, past.count
        kept = state.values.shape[1]
        blocks = -(-values.shape[1] // self.ratio)
        lead = int(self.overlap)
        rows = [jnp.concatenate([old, new], axis=1) for old, new in ((state.values, values), (state.gates, gates))]
        first = kept - before % self.ratio - lead * self.ratio
        blocked = [self._blocked(rows_from(part, first, (lead + blocks) * self.ratio)) for part in rows]
        pooled = self._pool(blocked[0], blocked[1], before >= self.ratio if lead else None)

        block = before[:, None] // self.ratio + jnp.arange(blocks)
        starts = positions[:, :1] - before[:, None] + block * self.ratio
        fresh = self._entries(pooled.astype(state.entries.dtype), starts, table, taps)
        complete = (block + 1) * self.ratio <= (before + count)[:, None]
        entries = written(state.entries, fresh, block, complete)
        return entries, Compressed(latest(rows[0], past.kept, kept), latest(rows[1], past.kept, kept), entries)

    def _blocked(self, rows: Float[Array, "B X W"]) -> Float[Array, "B blocks r W"]:
        return rows.reshape(rows.shape[0], -1, self.ratio, rows.shape[2])

    def _pool(
        self,
        values: Float[Array, "B blocks r W"],
        gates: Float[Array, "B blocks r W"],
        has_lead: Bool[Array, " B"] | None = None,
    ) -> Float[Array, "B T C"]:
        """Gated sum of every block. With ``has_lead`` block 0 only leads into block 1, in prompts where it is true."""
        gates = gates.astype(jnp.float32) + self.ape[...]
        if has_lead is not None:
            exists = has_lead[:, None] | (jnp.arange(gates.shape[1]) > 0)
            gates = jnp.where(exists[..., None, None], gates, -jnp.inf)
        if self.overlap:
            values = _with_previous(values, 0.0)
            gates = _with_previous(gates, -jnp.inf)
        if has_lead is not None:
            values, gates = values[:, 1:], gates[:, 1:]
        shares = jax.nn.softmax(gates, axis=2)
        return jnp.sum(values.astype(jnp.float32) * shares, axis=2).astype(values.dtype)

    def _entries(
        self, pooled: Float[Array, "B T C"], starts: Int[Array, "B T"], table: np.ndarray, taps: Taps
    ) -> Float[Array, "B T C"]:
        """Norm, rotation and rounding of the pooled sums; ``starts`` are the positions of the blocks' first tokens."""
        normed = taps("norm", rms_norm(taps("pooled", pooled), self.norm[...], self.eps))
        rotated = rotate(normed, starts, table)
        numerics = self.numerics
        return taps("entries", numerics.indexed(rotated) if self.indexed else numerics.entry(rotated, 2 * len(table)))


def written(
    entries: Float[Array, "B T C"], fresh: Float[Array, "B X C"], block: Int[Array, "B X"], complete: Bool[Array, "B X"]
) -> Float[Array, "B T C"]:
    """``entries`` with ``fresh`` ones in the places of their blocks; those of incomplete blocks are dropped."""
    slot = jnp.where(complete, block, entries.shape[1])  # out of range, and so dropped
    return entries.at[jnp.arange(len(entries))[:, None], slot].set(fresh, mode="drop")


def rows_from(rows: Float[Array, "B X W"], first: Int[Array, " B"], count: int) -> Float[Array, "B Y W"]:
    """``count`` rows of each prompt from its ``first`` on, padded with zeros."""
    padded = jnp.pad(rows, ((0, 0), (0, count), (0, 0)))
    return jax.vmap(lambda part, start: jax.lax.dynamic_slice_in_dim(part, start, count))(padded, first)


def _with_previous(rows: Float[Array, "B T r W"], nothing: float) -> Float[Array, "B T rows C"]:
    """Rows of overlapping blocks: the first half of the previous block's channels, then the block's own second half."""
    for_next, own = jnp.split(rows, 2, axis=-1)
    previous = jnp.pad(for_next, ((0, 0), (1, 0), (0, 0), (0, 0)), constant_values=nothing)[:, : rows.shape[1]]
    return jnp.concatenate([previous, own], axis=2)
