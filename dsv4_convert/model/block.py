"""One layer: an attention half and an expert half, each inside a hyper-connection; and the block of an mtp stage.

Shape letters: ``B`` batch, ``S`` tokens, ``N`` streams, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array, Float, Int

from dsv4_convert.model.attention import Attention
from dsv4_convert.model.cache import LayerCache, Past
from dsv4_convert.model.experts import Experts, SharedExpert
from dsv4_convert.model.hyper_connection import Mix, collapse, mix, spread
from dsv4_convert.model.norm import rms_norm
from dsv4_convert.model.numerics import PLAIN, Numerics
from dsv4_convert.model.ops import parameter
from dsv4_convert.model.recording import Taps
from dsv4_convert.model.router import Router, Routing
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.v4.config import V4Config
from dsv4_convert.spec.v4.kinds import AttentionKind


class Routed(NamedTuple):
    """The expert half up to the experts: their input, their routing, and the mixing that spreads their output."""

    x: Float[Array, "B S D"]
    routing: Routing
    mixing: Mix


class FeedForward(nnx.Module):
    """Router, routed experts and shared expert. ``experts`` is None where the caller computes them itself."""

    def __init__(self, config: Config, *, hashed: bool, with_experts: bool, numerics: Numerics) -> None:
        self.gate = Router(config, hashed=hashed, numerics=numerics)
        self.experts = Experts(config, numerics) if with_experts else None
        self.shared_experts = SharedExpert(config, numerics)


class DecoderBlock(nnx.Module):
    """One layer of the backbone, whatever the architecture. It does not know its index: layers of one kind share a
    program.

    A layer hands its *carry* to the next one: the streams, and what else an architecture carries from layer to layer. A
    subclass has ``attend``, ``route`` and ``combine``. With ``with_experts=False`` the block holds everything but the
    routed experts, which are nearly all of a layer's weights: a caller that streams them calls ``route``, computes them
    one by one, and calls ``combine``. A block that looks up rows of a table (``config.table_of``) lacks the table, too:
    the caller reads the :meth:`wanted_rows`, and hands them over with ``join``, which returns what enters ``attend``.
    """

    attend: Callable[..., tuple[Any, Any]]
    route: Callable[..., Routed]
    combine: Callable[..., Any]
    join: Callable[..., Any]

    def __init__(self, config: Config, attention: Any, *, hashed: bool, with_experts: bool, numerics: Numerics) -> None:
        self.config = config
        mixes, flat = config.hc_mixes, config.hc_mult * config.hidden_size
        self.hc_attn_fn = parameter("mix streams", mixes, flat)
        self.hc_attn_base = parameter("mix", mixes)
        self.hc_attn_scale = parameter("mix", 3)
        self.attn_norm = parameter("whole_width", config.hidden_size)
        self.attn = attention
        self.hc_ffn_fn = parameter("mix streams", mixes, flat)
        self.hc_ffn_base = parameter("mix", mixes)
        self.hc_ffn_scale = parameter("mix", 3)
        self.ffn_norm = parameter("whole_width", config.hidden_size)
        self.ffn = FeedForward(config, hashed=hashed, with_experts=with_experts, numerics=numerics)

    def __call__(
        self, carry: Any, token_ids: Int[Array, "B S"], positions: Int[Array, "B S"], taps: Taps, past: Any = None
    ) -> tuple[Any, Any]:
        """The carry after the layer; with a ``past`` the layer's new state too."""
        carry, cache = self.attend(carry, token_ids, positions, taps, past)
        routed = self.route(carry, token_ids, taps)
        assert self.ffn.experts is not None
        output = self.ffn.experts(routed.x, routed.routing)
        return self.combine(carry, routed, output, taps), cache

    def wanted_rows(self, token_ids: Int[Array, "B S"], past: Any = None) -> Int[Array, "B S *rest"]:
        """The rows of its table that it looks up; with a ``past`` those after the tokens before."""
        return token_ids

    def _attention_mix(self, streams: Float[Array, "B S N D"], taps: Taps) -> Mix:
        weights = (self.hc_attn_fn[...], self.hc_attn_base[...], self.hc_attn_scale[...])
        return mix(streams, *weights, self.config, taps.within("hc_attn."))

    def _attention_input(
        self, streams: Float[Array, "B S N D"], pre: Float[Array, "B S N"], taps: Taps
    ) -> Float[Array, "B S D"]:
        collapsed = collapse(streams, pre, taps.within("hc_attn."))
        return taps("attn_norm", rms_norm(collapsed, self.attn_norm[...], self.config.rms_norm_eps))

    def _expert_mix(self, streams: Float[Array, "B S N D"], taps: Taps) -> Mix:
        weights = (self.hc_ffn_fn[...], self.hc_ffn_base[...], self.hc_ffn_scale[...])
        return mix(streams, *weights, self.config, taps.within("hc_ffn."))

    def _expert_input(
        self, streams: Float[Array, "B S N D"], pre: Float[Array, "B S N"], taps: Taps
    ) -> Float[Array, "B S D"]:
        collapsed = collapse(streams, pre, taps.within("hc_ffn."))
        return taps("ffn_norm", rms_norm(collapsed, self.ffn_norm[...], self.config.rms_norm_eps))

    def _spread(
        self, streams: Float[Array, "B S N D"], routed: Routed, experts: Float[Array, "B S D"], taps: Taps
    ) -> Float[Array, "B S N D"]:
        """The streams after the layer, from the routed experts' output on."""
        experts = taps("ffn.experts", experts)
        shared = taps("ffn.shared_experts", self.ffn.shared_experts(routed.x))
        output = taps("ffn", (experts + shared).astype(shared.dtype))
        return taps("hc_ffn.streams", spread(output, streams, routed.mixing))


class Block(DecoderBlock):
    """One layer of the backbone of V4. Its carry is the streams."""

    def __init__(
        self,
        config: V4Config,
        kind: AttentionKind,
        *,
        hashed: bool,
        with_experts: bool = True,
        numerics: Numerics = PLAIN,
    ) -> None:
        attention = Attention(config, kind, numerics)
        super().__init__(config, attention, hashed=hashed, with_experts=with_experts, numerics=numerics)

    def attend(
        self,
        streams: Float[Array, "B S N D"],
        token_ids: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        taps: Taps,
        past: Past[LayerCache] | None = None,
    ) -> tuple[Float[Array, "B S N D"], LayerCache | None]:
        """The attention half; with a ``past`` the layer's new state too."""
        streams = taps("input", streams)
        mixing = self._attention_mix(streams, taps)
        output, cache = self.attn(
            self._attention_input(streams, mixing.pre, taps), positions, taps.within("attn."), past
        )
        return taps("hc_attn.streams", spread(output, streams, mixing)), cache

    def route(self, streams: Float[Array, "B S N D"], token_ids: Int[Array, "B S"], taps: Taps) -> Routed:
        """The expert half up to the experts' input and the routing."""
        mixing = self._expert_mix(streams, taps)
        x = self._expert_input(streams, mixing.pre, taps)
        return Routed(x, self.ffn.gate(x, token_ids, taps.within("ffn.gate.")), mixing)

    def combine(
        self, streams: Float[Array, "B S N D"], routed: Routed, experts: Float[Array, "B S D"], taps: Taps
    ) -> Float[Array, "B S N D"]:
        """The expert half from the routed experts' output on."""
        return self._spread(streams, routed, experts, taps)


class MTPBlock(Block):
    """One stage of multi-token prediction: input projections, a window-only score-routed block, and head parameters.

    1. The embedding e of token t + 1 joins the streams h_j that leave the backbone at token t:
       x_j = e_proj(enorm(e)) + h_proj(hnorm(h_j)).
    2. The block mixes its attention, over the stage's own past, and its experts into x.
    3. After the stage's own collapse and norm, the model's output head gives the logits of token t + 2
       (:meth:`Model.draft`).

    It extends a block instead of holding one, since its parameters have the published names, ``mtp.0.attn.wq_a``.
    Source: published inference code, the block of its ``mtp`` layers.
    """

    def __init__(self, config: V4Config, numerics: Numerics = PLAIN, *, with_experts: bool = True) -> None:
        super().__init__(config, AttentionKind.SLIDING, hashed=False, with_experts=with_experts, numerics=numerics)
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
        """The stage's own streams, from the backbone's streams and the tokens after theirs (embeddings and ids).

        ``positions`` belong to the streams' tokens. With a ``past`` the stage's new state is returned too.
        """
        return self(self.join(streams, embedded, taps), next_ids, positions, taps, past)

    def join(
        self, streams: Float[Array, "B S N D"], embedded: Float[Array, "B S D"], taps: Taps
    ) -> Float[Array, "B S N D"]:
        """The streams that enter the stage's layer."""
        eps = self.config.rms_norm_eps
        streams, embedded = taps("streams", streams), taps("embed", embedded)
        token = taps("enorm", rms_norm(embedded, self.enorm[...], eps))
        past = taps("hnorm", rms_norm(streams, self.hnorm[...], eps))
        token = taps("e_proj", self.numerics.linear(token, self.e_proj.get_value()))
        past = taps("h_proj", self.numerics.linear(past, self.h_proj.get_value()))
        return token[:, :, None] + past
