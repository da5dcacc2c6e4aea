"""Engram: a table of n-grams that writes into the streams before a layer.

Shape letters: ``B`` batch, ``S`` tokens, ``N`` streams, ``D`` width, ``L`` tokens of the longest n-gram, ``J`` rows
that a token looks up, ``P`` tokens before, ``X`` rows of the table, ``C`` width of a row, ``Z`` prompts of all devices,
``Q`` tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from dsv4_convert.model.axes import gather_prompts, own_rows, shard_map, sum_to_prompts
from dsv4_convert.model.cache import Past, V41LayerCache, latest
from dsv4_convert.model.encoded import Encoded
from dsv4_convert.model.norm import rms_scale
from dsv4_convert.model.numerics import Numerics
from dsv4_convert.model.ops import derived, map_query_chunks, parameter
from dsv4_convert.model.recording import Taps
from dsv4_convert.spec.v41.config import V41Config
from dsv4_convert.spec.v41.ngrams import NgramHash, ngram_hash

#: Bits of a limb of a product, and limbs: a mapped id has 17 bits at most, a multiplier 63.
LIMB_BITS, LIMBS = 15, 5
#: Numbers of a table that devices exchange at once.
_AT_ONCE = 1 << 26
#: Smallest magnitude under the square root of a gate.
_LEAST = 1e-6


class Engram(nnx.Module):
    """Adds a value to every stream, gated by how well the stream matches a key; both come from a table of n-grams.

    1. Token ids are mapped to fewer ids: tokens that are alike but for case, accents and blanks have the same
       (``token_map``, made from the checkpoint's tokenizer).
    2. The n-grams of 2 to L tokens that end with a token are hashed to J rows of the table (:func:`ngram_rows`).
    3. These rows, side by side, times ``wkv`` give N keys and one value.
    4. Stream n gets gate_n value, with gate_n = sigmoid(sign(m_n) sqrt(max(|m_n|, 1e-6))) and
       m_n = sum_d h_nd q_nd k_nd key_nd / (rms(h_n) rms(key_n) sqrt(D)).

    Source: published inference code of V4.1, ``Engram`` and ``NgramHashState``.
    """

    looked_up: Float[Array, "B S J C"] | None

    def __init__(self, config: V41Config, index: int, numerics: Numerics, *, with_table: bool = True) -> None:
        """``index``: which of the config's engrams it is. Without its table it takes rows that are ``looked_up``."""
        engram = config.engram
        assert engram is not None
        self.numerics = numerics
        self.eps = config.rms_norm_eps
        self.hash = ngram_hash(engram, index)
        self.pad = engram.pad_token_id
        streams, width = config.hc_mult, config.hidden_size
        self.token_map = derived("token", config.vocab_size, dtype=jnp.int32)
        self.embed = parameter("ngram entry", engram.num_embeddings[index], engram.head_dim) if with_table else None
        self.looked_up = nnx.data(None)
        rows = len(self.hash.primes)
        self.wkv = parameter("width whole_width", rows * engram.head_dim, (streams + 1) * width)
        self.q_weight = parameter("streams whole_width", streams, width)
        self.k_weight = parameter("streams whole_width", streams, width)

    def __call__(
        self,
        streams: Float[Array, "B S N D"],
        token_ids: Int[Array, "B S"],
        taps: Taps,
        past: Past[V41LayerCache] | None = None,
    ) -> tuple[Float[Array, "B S N D"], Int[Array, "B P"] | None]:
        """The streams with what the table has for the tokens; with a ``past`` the last tokens seen too."""
        batch, tokens, count, width = streams.shape
        index, history = self.wanted_rows(token_ids, past)
        index = taps("ids", index)
        rows = self.looked_up if self.embed is None else rows_of(self.embed.get_value(), index)
        assert rows is not None
        rows = rows.astype(streams.dtype)
        both = self.numerics.linear(rows.reshape(batch, tokens, -1), self.wkv.get_value())
        key, value = jnp.split(both, [count * width], axis=-1)
        key = taps("key", key.reshape(streams.shape))
        value = taps("value", value).astype(jnp.float32)
        gate = taps("gate", self._gate(streams.astype(jnp.float32), key.astype(jnp.float32)))
        added = streams.astype(jnp.float32) + gate[..., None] * value[:, :, None]
        after = None if past is None else latest(history, past.kept, len(self.hash.multipliers) - 1)
        return taps("streams", added.astype(streams.dtype)), after

    def wanted_rows(
        self, token_ids: Int[Array, "B S"], past: Past[V41LayerCache] | None = None
    ) -> tuple[Int[Array, "B S J"], Int[Array, "B PS"]]:
        """The rows of the table, and the ids of the tokens that they are hashed from, -1 before the first one."""
        before = len(self.hash.multipliers) - 1
        recent = None if past is None else past.cache.recent
        earlier = jnp.full((len(token_ids), before), -1, jnp.int32) if recent is None else recent
        history = jnp.concatenate([earlier, token_ids.astype(jnp.int32)], axis=1)
        mapped = self.token_map[...][jnp.where(history < 0, self.pad, history)]
        return ngram_rows(mapped, self.hash), history

    def _gate(self, h: Float[Array, "B S N D"], key: Float[Array, "B S N D"]) -> Float[Array, "B S N"]:
        weight = self.q_weight[...].astype(jnp.float32) * self.k_weight[...].astype(jnp.float32)
        scale = (rms_scale(h, self.eps) * rms_scale(key, self.eps))[..., 0]
        match = jnp.sum(h * weight * key, axis=-1) * scale * h.shape[-1] ** -0.5
        return jax.nn.sigmoid(jnp.copysign(jnp.sqrt(jnp.maximum(jnp.abs(match), _LEAST)), match))


@shard_map(X="ngram")
def rows_of(table: Float[Array | Encoded, "X C"], index: Int[Array, "B S J"]) -> Float[Array, "B S J C"]:
    """Rows of a table; of one that holds codes, no other row is decoded.

    Devices with a part of the table look up what all of them need and add it up, a chunk of tokens at a time.
    """
    wanted = gather_prompts(index, "ngram")

    def looked_up(_: Array, chunk: Int[Array, "Z Q J"]) -> Any:
        return jax.tree.map(lambda part: sum_to_prompts(own_rows(part, chunk, "ngram"), "ngram"), table)

    longest = max(1, _AT_ONCE // (len(wanted) * index.shape[2] * table.shape[1]))
    rows = map_query_chunks(looked_up, longest, wanted)
    return rows[...] if isinstance(rows, Encoded) else rows


def ngram_rows(mapped: Int[Array, "B PS"], ngrams: NgramHash) -> Int[Array, "B S J"]:
    """The rows of the table that the n-grams ending with each token are hashed to.

    The ids of a token and of those before it are multiplied, each by the multiplier of its distance, and joined by
    exclusive or, one more token for each length of n-gram. The remainder by a prime is a row of the part of the table
    that belongs to this length and head. ``mapped``: ids of the L - 1 tokens before the first one, then of the tokens.

    Products have 63 bits and JAX has 32 by default, so they are numbers of :data:`LIMBS` limbs.
    """
    look_back = len(ngrams.multipliers) - 1
    tokens, heads = mapped.shape[1] - look_back, len(ngrams.primes) // look_back
    joined = _product(mapped[:, look_back:], ngrams.multipliers[0])
    found = []
    for distance in range(1, look_back + 1):
        first = look_back - distance
        other = _product(mapped[:, first : first + tokens], ngrams.multipliers[distance])
        joined = [one ^ limb for one, limb in zip(joined, other, strict=True)]
        columns = slice((distance - 1) * heads, distance * heads)
        primes, offsets = (np.asarray(part[columns], np.uint32) for part in (ngrams.primes, ngrams.offsets))
        found.append(_remainder(joined, primes) + offsets)
    return jnp.concatenate(found, axis=-1).astype(jnp.int32)


def _product(ids: Int[Array, "B S"], multiplier: int) -> list[UInt32[Array, "B S"]]:
    """The limbs of a product, lowest first. An id of 17 bits times a limb, plus a carry, fits 32 bits."""
    limbs, carry = [], jnp.zeros(ids.shape, jnp.uint32)
    mask = (1 << LIMB_BITS) - 1
    for limb in range(LIMBS):
        part = np.uint32((multiplier >> (LIMB_BITS * limb)) & mask)
        carry = ids.astype(jnp.uint32) * part + carry
        limbs.append(carry & np.uint32(mask))
        carry >>= LIMB_BITS
    return limbs


def _remainder(limbs: list[UInt32[Array, "B S"]], primes: np.ndarray) -> UInt32[Array, "B S J"]:
    """The remainder by primes below 2^24, from the highest bits on: a remainder and 8 more bits fit 32 bits."""
    found = jnp.zeros((*limbs[0].shape, len(primes)), jnp.uint32)
    for limb in reversed(limbs):
        found = (found << 8 | limb[..., None] >> 7) % primes
        found = (found << 7 | limb[..., None] & np.uint32(127)) % primes
    return found
