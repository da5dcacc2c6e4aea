"""The draft stages of V4.1 (:mod:`dsv4_convert.model.dspark`): they hand on the weights that collapse their streams."""

from __future__ import annotations

from dsv4_convert.model.dspark import BlockAttention, DSparkBlock
from dsv4_convert.model.numerics import PLAIN, Numerics
from dsv4_convert.model.recording import Taps
from dsv4_convert.model.v41.attention import SharedAttention
from dsv4_convert.model.v41.block import Carry, V41Block
from dsv4_convert.spec.v41.config import V41Config


class V41BlockAttention(BlockAttention, SharedAttention):
    """Attention of a block of V4.1: queries are not normed per head, and all channels of a key are rounded."""


class V41DSparkBlock(DSparkBlock, V41Block):
    """A block of V4.1, with experts of its own number. The streams of the last one are collapsed as a layer's."""

    def __init__(self, config: V41Config, stage: int, numerics: Numerics = PLAIN, *, with_experts: bool = True) -> None:
        config = config.of_stages
        kind = config.layer_kind(config.stage_layers[stage])
        super().__init__(config, kind, with_experts=with_experts, numerics=numerics)
        self.numerics = numerics
        self.attn = V41BlockAttention(config, kind, numerics)
        self.add_ends(stage)

    @staticmethod
    def entering(carry: Carry, taps: Taps) -> Carry:
        """The streams that leave the block before, and its weights."""
        return carry._replace(streams=taps("streams", carry.streams), pre=taps("pre", carry.pre))
