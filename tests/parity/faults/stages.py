"""Faults of the mtp stage: what leads into it, its own layer, and its head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import dsv4_convert.parity.forward as forward_module
from dsv4_convert.golden.layout import token_ids
from dsv4_convert.model import attention
from dsv4_convert.model.block import MTPBlock
from dsv4_convert.model.norm import rms_norm
from dsv4_convert.model.rope import rotate as _rotate

from .decoding import _where
from .fault import STAGE, Fault
from .weights import _change, _copy, _swap, _two_swapped


def _join(
    *,
    embed: Callable[[Any], Any] = lambda embedded: embedded,
    enorm: Callable[..., Any] = rms_norm,
    hnorm: Callable[..., Any] = rms_norm,
    add: Callable[[Any, Any, Any], Any] = lambda token, past, streams: token[:, :, None] + past,
) -> dict[tuple[Any, str], Any]:
    """The stage's input with one of its steps replaced."""

    def join(self: Any, streams: Any, embedded: Any, taps: Any) -> Any:
        eps = self.config.rms_norm_eps
        streams, embedded = taps("streams", streams), taps("embed", embed(embedded))
        token = taps("enorm", enorm(embedded, self.enorm[...], eps))
        past = taps("hnorm", hnorm(streams, self.hnorm[...], eps))
        token = taps("e_proj", self.numerics.linear(token, self.e_proj[...]))
        past = taps("h_proj", self.numerics.linear(past, self.h_proj[...]))
        return add(token, past, streams)

    return {(MTPBlock, "join"): join}


def _over_all_streams(streams: Any, weight: Any, eps: float) -> Any:
    return streams / jnp.sqrt(jnp.mean(jnp.square(streams), axis=(-2, -1), keepdims=True) + eps) * weight


def _of_the_mean(streams: Any, weight: Any, eps: float) -> Any:
    mean = jnp.broadcast_to(jnp.mean(streams, axis=2, keepdims=True), streams.shape)
    return rms_norm(mean, weight, eps)


def _to_the_first(token: Any, past: Any, streams: Any) -> Any:
    return past.at[:, :, 0].add(token)


def _ids(change: Callable[..., Any]) -> dict[tuple[Any, str], Any]:
    return {(forward_module, "token_ids"): change}


def _two_ahead(tokens: Any, config: Any, layer: int | None) -> Any:
    return token_ids(token_ids(tokens, config, layer), config, layer)


def _moved(x: Any, positions: Any, table: Any, *, inverse: bool = False) -> Any:
    ahead = 1 if x.ndim == 4 and not inverse else 0
    return _rotate(x, positions + ahead, table, inverse=inverse)


def _stage(name: str, tap: str, **what: Any) -> Fault:
    return Fault(name=f"mtp: {name}", layer=STAGE, tap=tap, model="staged", **what)


_HEAD = ("hc_head_fn", "hc_head_base", "hc_head_scale")

STAGES: tuple[Fault, ...] = (
    _stage("ids of the streams' own tokens", "embed", code=_ids(lambda tokens, config, layer: tokens)),
    _stage("ids of the tokens after the next", "embed", code=_ids(_two_ahead)),
    _stage("embedding scaled by the root of the width", "embed", code=_join(embed=lambda e: e * e.shape[-1] ** 0.5)),
    _stage("embedding not normed", "enorm", code=_join(enorm=lambda x, *_: x)),
    _stage("streams not normed", "hnorm", code=_join(hnorm=lambda x, *_: x)),
    _stage("one norm over all streams", "hnorm", code=_join(hnorm=_over_all_streams)),
    _stage("streams averaged first", "hnorm", code=_join(hnorm=_of_the_mean)),
    _stage("embedding joins the first stream alone", "input", code=_join(add=_to_the_first)),
    _stage("streams added to what enters", "input",
           code=_join(add=lambda token, past, streams: token[:, :, None] + past + streams)),
    _stage("embedding left out", "input", code=_join(add=lambda token, past, streams: past)),
    _stage("norms swapped", "enorm", arrays=_swap("mtp.0.enorm", "mtp.0.hnorm")),
    _stage("projections swapped", "e_proj", arrays=_swap("mtp.0.e_proj", "mtp.0.h_proj")),
    _stage("e_proj transposed", "e_proj", arrays=_change("mtp.0.e_proj", np.transpose)),
    _stage("h_proj transposed", "h_proj", arrays=_change("mtp.0.h_proj", np.transpose)),
    _stage("e_proj missing its scale", "e_proj",
           tensor=_where(r"mtp\.0\.e_proj\.scale", lambda a: np.full_like(a, 127))),
    _stage("queries of the layer before", "attn.wq_a", arrays=_copy("mtp.0.attn.wq_a", "layers.0.attn.wq_a")),
    _stage("sinks left at zero", "attn.context", arrays=_change("mtp.0.attn.attn_sink", np.zeros_like)),
    _stage("rope base of the compressed layers", "attn.q_rope", config={"rope_theta": 160000.0}),
    _stage("queries at the next position", "attn.q_rope", code={(attention, "rotate"): _moved}),
    _stage("window one too long", "attn.context", config={"sliding_window": 17}),
    _stage("router bias dropped", "ffn.gate.scores", arrays=_change("mtp.0.ffn.gate.bias", np.zeros_like)),
    _stage("two experts swapped in w1", "ffn.experts", arrays=_change("mtp.0.ffn.experts.w1", _two_swapped)),
    _stage("one expert missing its scale", "ffn.experts",
           tensor=_where(r"mtp\.0\.ffn\.experts\.3\.w2\.scale", lambda a: np.full_like(a, 127))),
    _stage("the model's collapse", "hc_head.pre", arrays=lambda arrays: [
        arrays.update({f"mtp.0.{part}": arrays[part]}) for part in _HEAD]),
    _stage("collapse without its base", "hc_head.pre", arrays=_change("mtp.0.hc_head_base", np.zeros_like)),
    _stage("the model's norm", "norm", arrays=_copy("mtp.0.norm", "norm")),
)  # fmt: skip
