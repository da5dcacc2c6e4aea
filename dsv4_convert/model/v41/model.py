"""The whole model of V4.1, from tokens to logits.

Shape letters: ``B`` batch, ``S`` tokens, ``N`` streams, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsv4_convert.model.hyper_connection import collapse
from dsv4_convert.model.model import Decoder
from dsv4_convert.model.numerics import PLAIN, Numerics
from dsv4_convert.model.recording import Taps
from dsv4_convert.model.v41.attention import Shared
from dsv4_convert.model.v41.block import Carry
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.v41.config import V41Config

#: The taps that a carry is made of, by their names within the layer that makes them.
_STREAMS, _PRE = "hc_ffn.streams", "hc_ffn.pre"
_SHARED = ("attn.compressor.entries", "attn.indexer.keys", "attn.indexer.chosen", "attn.indexer.candidates")


class V41Model(Decoder):
    """DeepSeek-V4.1, its text model.

    The last layer's experts weigh the streams' collapse before the output head. Image tokens are not supported.

    Source: published inference code of V4.1, ``Transformer``.
    """

    collapsed = "hc_head.collapsed"

    def __init__(self, config: V41Config, numerics: Numerics = PLAIN, *, scanned: bool = False) -> None:
        """``scanned``: layers of one kind share a program, and their weights are stacked."""
        super().__init__(config, numerics, scanned=scanned)

    @staticmethod
    def enter(streams: Float[Array, "B S N D"]) -> Carry:
        """The carry of layer 0: the first half has no half before it, and takes stream 0."""
        pre = jnp.zeros(streams.shape[:3], jnp.float32).at[..., 0].set(1)
        return Carry(streams, pre, Shared())

    @staticmethod
    def leave(carry: Carry) -> Carry:
        """The streams that leave the last layer, and the weights that collapse them before the head."""
        return Carry(carry.streams, carry.pre, Shared())

    @staticmethod
    def carry_of(taps: Mapping[str, Any], dtype: DTypeLike) -> Carry:
        """The carry that is made of these taps; results of other layers may be missing."""
        kinds = (dtype, dtype, jnp.int32, jnp.int32)
        shared = [
            None if name not in taps else jnp.asarray(taps[name], kind)
            for name, kind in zip(_SHARED, kinds, strict=True)
        ]
        return Carry(jnp.asarray(taps[_STREAMS], dtype), jnp.asarray(taps[_PRE], jnp.float32), Shared(*shared))

    @staticmethod
    def taps_of(carry: Carry) -> dict[str, Array]:
        """The taps that a carry is made of."""
        shared = zip(_SHARED, carry.shared, strict=True)
        return {_STREAMS: carry.streams, _PRE: carry.pre} | {name: value for name, value in shared if value is not None}

    @staticmethod
    def collapse(
        carry: Carry, weights: Sequence[Float[Array, "..."]], config: Config, taps: Taps
    ) -> Float[Array, "B S D"]:
        """The one stream that the head reads."""
        return collapse(carry.streams, carry.pre, taps.within("hc_head."))
