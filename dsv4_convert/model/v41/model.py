"""The whole model of V4.1, from tokens to logits.

Shape letters: ``B`` batch, ``S`` tokens, ``N`` streams, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv4_convert.model.hyper_connection import collapse
from dsv4_convert.model.model import Decoder, output
from dsv4_convert.model.numerics import PLAIN, Numerics
from dsv4_convert.model.recording import Taps
from dsv4_convert.model.v41.attention import Shared
from dsv4_convert.model.v41.block import Carry
from dsv4_convert.spec.v41.config import V41Config


class V41Model(Decoder):
    """DeepSeek-V4.1, its text model.

    The last layer's experts weigh the streams' collapse before the output head. Image tokens are not supported.

    Source: published inference code of V4.1, ``Transformer``.
    """

    def __init__(self, config: V41Config, numerics: Numerics = PLAIN, *, scanned: bool = False) -> None:
        """``scanned``: layers of one kind share a program, and their weights are stacked."""
        super().__init__(config, numerics, scanned=scanned)

    def enter(self, streams: Float[Array, "B S N D"]) -> Carry:
        """The carry of layer 0: the first half has no half before it, and takes stream 0."""
        pre = jnp.zeros(streams.shape[:3], jnp.float32).at[..., 0].set(1)
        return Carry(streams, pre, Shared())

    def leave(self, carry: Carry) -> Carry:
        """The streams that leave the last layer, and the weights that collapse them before the head."""
        return Carry(carry.streams, carry.pre, Shared())

    def logits(self, carry: Carry, taps: Taps) -> Float[Array, "B S V"]:
        """Logits of the streams that leave the last layer."""
        x = collapse(carry.streams, carry.pre, taps.within("hc_head."))
        return output(x, self.norm[...], self.head[...], self.config, taps)
