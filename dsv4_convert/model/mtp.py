"""Multi-token prediction: the stage after the backbone, which drafts the token after the next.

Shape letters: ``B`` batch, ``S`` tokens, ``N`` streams, ``D`` width.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from dsv4_convert.model.block import Block
from dsv4_convert.model.cache import LayerCache, Past
from dsv4_convert.model.norm import rms_norm
from dsv4_convert.model.numerics import PLAIN, Numerics
from dsv4_convert.model.parameters import parameter
from dsv4_convert.model.recording import Taps
from dsv4_convert.spec.config import Config


class Stage(Block):
    """One stage: what leads into a window-only, score-routed block, the block, and a head's own parameters.

    1. The embedding e of token t + 1 joins the streams h_j that left the backbone at token t:
       x_j = e_proj(enorm(e)) + h_proj(hnorm(h_j)).
    2. The block mixes its attention, over the stage's own past, and its experts into x.
    3. Collapse and norm of its own, then the model's output head (:meth:`Model.draft`): logits of token t + 2.

    It is a block, not around one, because its parameters have the published names, ``mtp.0.attn.wq_a``.
    Source: published inference code, the block of its ``mtp`` layers.
    """

    def __init__(self, config: Config, numerics: Numerics = PLAIN) -> None:
        super().__init__(config, AttentionKind.SLIDING, hashed=False, numerics=numerics)
        self.numerics = numerics
        streams, width = config.hc_mult, config.hidden_size
        self.e_proj = parameter("width whole_width", width, width)
        self.h_proj = parameter("width whole_width", width, width)
        self.enorm = parameter("whole_width", width)
        self.hnorm = parameter("whole_width", width)
        self.norm = parameter("whole_width", width)
        self.hc_head_fn = parameter("mix streams", streams, streams * width)
        self.hc_head_base = parameter("mix", streams)
        self.hc_head_scale = parameter("mix", 1)

    def predict(
        self,
        streams: Float[Array, "B S N D"],
        embedded: Float[Array, "B S D"],
        next_ids: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        taps: Taps,
        past: Past[LayerCache] | None = None,
    ) -> tuple[Float[Array, "B S N D"], LayerCache | None]:
        """Streams of tokens, and the ids and embeddings of those after them, to the stage's own streams.

        ``positions`` are those of the streams' tokens. With a ``past`` the stage's new state comes too.
        """
        return self(self._joined(streams, embedded, taps), next_ids, positions, taps, past)

    def _joined(
        self, streams: Float[Array, "B S N D"], embedded: Float[Array, "B S D"], taps: Taps
    ) -> Float[Array, "B S N D"]:
        eps = self.config.rms_norm_eps
        token = taps("enorm", rms_norm(embedded, self.enorm[...], eps))
        past = taps("hnorm", rms_norm(streams, self.hnorm[...], eps))
        token = taps("e_proj", self.numerics.linear(token, self.e_proj[...]))
        past = taps("h_proj", self.numerics.linear(past, self.h_proj[...]))
        return token[:, :, None] + past
