"""Manifold-constrained hyper-connections: N residual streams instead of one (paper section 2.2).

Shape letters: ``B`` batch, ``S`` tokens, ``N`` streams, ``D`` width, ``M`` = (2 + N) N mixing weights.
All mixing weights are computed and applied in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv4_convert.model.norm import rms_scale
from dsv4_convert.model.ops import einsum_f32
from dsv4_convert.model.recording import Taps
from dsv4_convert.spec.config import Config


class Mix(NamedTuple):
    """Mixing weights of one half of a layer.

    ``pre`` collapses the streams to the input of a half; ``post`` spreads the half's output over the streams; ``comb``,
    indexed [from, to], mixes the streams that bypass it.
    """

    pre: Float[Array, "B S N"]
    post: Float[Array, "B S N"]
    comb: Float[Array, "B S N N"]


def mix(
    streams: Float[Array, "B S N D"],
    fn: Float[Array, "M ND"],
    base: Float[Array, " M"],
    scale: Float[Array, "3"],
    config: Config,
    taps: Taps,
) -> Mix:
    """Mixing weights of one half, from the streams that enter it.

    The products m = fn z / rms(z) for the flattened streams z split into N, N and N*N numbers. From these follow
    pre = sigmoid(m s0 + b) + eps, post = 2 sigmoid(m s1 + b) and comb = Sinkhorn(m s2 + b), where s is ``scale`` and b
    the matching part of ``base``.
    Source: paper section 2.2; published inference code, ``hc_pre`` and ``hc_split_sinkhorn``.
    """
    n = config.hc_mult
    m = _project(streams, fn, config.rms_norm_eps)
    pre = jax.nn.sigmoid(m[..., :n] * scale[0] + base[:n]) + config.hc_eps
    post = 2 * jax.nn.sigmoid(m[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    logits = (m[..., 2 * n :] * scale[2] + base[2 * n :]).reshape(*m.shape[:-1], n, n)
    pre = taps("pre", pre)
    post = taps("post", post)
    comb = taps("comb", sinkhorn(logits, config.hc_sinkhorn_iters, config.hc_eps))
    return Mix(pre, post, comb)


def collapse(streams: Float[Array, "B S N D"], pre: Float[Array, "B S N"], taps: Taps) -> Float[Array, "B S D"]:
    """The input of one half: ``sum_n pre_n streams_n``."""
    return taps("collapsed", _collapse(streams, pre))


def sinkhorn(logits: Float[Array, "*batch N N"], iterations: int, eps: float) -> Float[Array, "*batch N N"]:
    """A nearly doubly stochastic matrix: softmax over rows, then columns and rows normalised in turn, columns last."""
    c = jax.nn.softmax(logits, axis=-1) + eps
    c = c / (jnp.sum(c, axis=-2, keepdims=True) + eps)

    def both(_: Int[Array, ""] | int, c: Array) -> Array:
        c = c / (jnp.sum(c, axis=-1, keepdims=True) + eps)
        return c / (jnp.sum(c, axis=-2, keepdims=True) + eps)

    return jax.lax.fori_loop(0, iterations - 1, both, c)


def spread(output: Float[Array, "B S D"], streams: Float[Array, "B S N D"], mixing: Mix) -> Float[Array, "B S N D"]:
    """New streams: ``post_k * output + sum_j comb_jk * streams_j``. The sum runs over the first index of comb."""
    bypass = einsum_f32("bsjk,bsjd->bskd", mixing.comb, streams.astype(jnp.float32))
    spread_out = mixing.post[..., None] * output[..., None, :].astype(jnp.float32)
    return (spread_out + bypass).astype(streams.dtype)


def head_collapse(
    streams: Float[Array, "B S N D"],
    fn: Float[Array, "N ND"],
    base: Float[Array, " N"],
    scale: Float[Array, "1"],
    config: Config,
    taps: Taps,
) -> Float[Array, "B S D"]:
    """The streams' weighted sum before the final norm: like ``pre`` of a layer, with one scale for all N weights."""
    m = _project(streams, fn, config.rms_norm_eps)
    pre = taps("hc_head.pre", jax.nn.sigmoid(m * scale + base) + config.hc_eps)
    return taps("hc_head", _collapse(streams, pre))


def _project(streams: Float[Array, "B S N D"], fn: Float[Array, "M ND"], eps: float) -> Float[Array, "B S M"]:
    """``fn z / rms(z)``; the norm has no weight, so it is applied to the M products instead of to z."""
    z = streams.astype(jnp.float32).reshape(*streams.shape[:2], -1)
    return einsum_f32("bsz,mz->bsm", z, fn) * rms_scale(z, eps)


def _collapse(streams: Float[Array, "B S N D"], pre: Float[Array, "B S N"]) -> Float[Array, "B S D"]:
    # As a contraction: XLA on CPU is slow in the same sum over a short middle axis (benchmarks/xla_limits.py).
    return einsum_f32("bsn,bsnd->bsd", pre, streams.astype(jnp.float32)).astype(streams.dtype)
