"""One layer of V4.1: an engram in some, then the halves, each with an input that the half before it weighs.

Shape letters: ``B`` batch, ``S`` tokens, ``N`` streams, ``D`` width, ``J`` rows of a table that a token looks up, ``C``
width of a row.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from flax import nnx
from jaxtyping import Array, Float, Int

from dsv4_convert.model.block import DecoderBlock, Routed
from dsv4_convert.model.cache import Past, V41LayerCache
from dsv4_convert.model.hyper_connection import spread
from dsv4_convert.model.numerics import PLAIN, Numerics
from dsv4_convert.model.recording import Taps
from dsv4_convert.model.v41.attention import Shared, SharedAttention
from dsv4_convert.model.v41.engram import Engram
from dsv4_convert.spec.v41.config import V41Config
from dsv4_convert.spec.v41.kinds import Candidates, LayerKind


class Carry(NamedTuple):
    """The carry of V4.1: the streams, the weights ``pre`` that collapse them next, and the shared past."""

    streams: Float[Array, "B S N D"]
    pre: Float[Array, "B S N"]
    shared: Shared


class V41Block(DecoderBlock):
    """One layer of the backbone of V4.1.

    The input of a half is collapsed with the weights ``pre`` that the half *before* it computed from its own streams;
    the ``post`` and ``comb`` of a half are its own. Source: published inference code of V4.1, ``Block``.
    """

    def __init__(
        self, config: V41Config, kind: LayerKind, *, with_experts: bool = True, numerics: Numerics = PLAIN
    ) -> None:
        attention = SharedAttention(config, kind, numerics)
        super().__init__(config, attention, hashed=False, with_experts=with_experts, numerics=numerics)
        self.kind = kind
        engram = kind.engram
        self.engram = None if engram is None else Engram(config, engram, numerics, with_table=with_experts)

    def attend(
        self,
        carry: Carry,
        token_ids: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        taps: Taps,
        past: Past[V41LayerCache] | None = None,
    ) -> tuple[Carry, V41LayerCache | None]:
        """The engram and the attention half; with a ``past`` the layer's new state too."""
        streams, pre, shared = self._entering(carry, taps)
        recent = None
        if self.engram is not None:
            streams, recent = self.engram(streams, token_ids, taps.within("engram."), past)
        mixing = self._attention_mix(streams, taps)
        x = self._attention_input(streams, pre, taps)
        output, shared, cache = self.attn(x, positions, shared, taps.within("attn."), past)
        streams = taps("hc_attn.streams", spread(output, streams, mixing))
        cache = None if cache is None else dataclasses.replace(cache, recent=recent)
        return Carry(streams, mixing.pre, shared), cache

    def wanted_rows(
        self, token_ids: Int[Array, "B S"], past: Past[V41LayerCache] | None = None
    ) -> Int[Array, "B S *rest"]:
        """The rows of the engram's table; without one, as any block."""
        if self.engram is None:
            return super().wanted_rows(token_ids, past)
        return self.engram.wanted_rows(token_ids, past)[0]

    def join(self, carry: Carry, rows: Float[Array, "B S J C"], taps: Taps) -> Carry:
        """The same carry; the engram, whose table is not there, has its rows."""
        assert self.engram is not None
        self.engram.looked_up = nnx.data(rows)
        return carry

    def _entering(self, carry: Carry, taps: Taps) -> Carry:
        """The carry through the taps of what this layer reads."""
        kind, shared = self.kind, carry.shared
        reads = {
            "entries": bool(kind.ratio) and not kind.compresses,
            "keys": kind.indexes and not kind.compresses,
            "chosen": bool(kind.ratio) and not kind.indexes,
            "candidates": kind.candidates is Candidates.USER,
        }
        streams, pre = taps("input", carry.streams), taps("input.pre", carry.pre)
        read = {name: taps(f"input.{name}", getattr(shared, name)) for name, does in reads.items() if does}
        return Carry(streams, pre, shared._replace(**read))

    def route(self, carry: Carry, token_ids: Int[Array, "B S"], taps: Taps) -> Routed:
        """The expert half up to the experts' input and the routing."""
        mixing = self._expert_mix(carry.streams, taps)
        x = self._expert_input(carry.streams, carry.pre, taps)
        return Routed(x, self.ffn.gate(x, token_ids, taps.within("ffn.gate.")), mixing)

    def combine(self, carry: Carry, routed: Routed, experts: Float[Array, "B S D"], taps: Taps) -> Carry:
        """The expert half from the routed experts' output on."""
        return Carry(self._spread(carry.streams, routed, experts, taps), routed.mixing.pre, carry.shared)
