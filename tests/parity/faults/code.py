"""Faults of the model's code: what people really write when they port it. Sources are named where a project had it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dsv4_convert.model import attention, block, compressor, experts, hyper_connection, indexer, numerics, router
from dsv4_convert.model import model as backbone
from dsv4_convert.model.indexer import chosen_mask as _chosen_mask
from dsv4_convert.model.norm import rms_norm as _rms_norm
from dsv4_convert.model.ops import einsum_f32 as _einsum_f32
from dsv4_convert.model.recording import Taps
from dsv4_convert.model.rope import frequencies
from dsv4_convert.model.rope import rotate as _rotate
from dsv4_convert.parity import forward
from dsv4_convert.spec.config import Config

from .fault import CLAMPED, CSA, HCA, LEARNED_CSA, MAIN, MIXED, PROJECTED, SLIDING, Fault

_ROPE = 8  # rotated channels
_CONFIG = Config.from_hf(MAIN)
_MAIN_TABLE = frequencies(_CONFIG, compressed=False)
_SCALED_TABLE = frequencies(_CONFIG, compressed=True)

_attend, _choose, _chosen_rows = attention.attend, indexer.choose, attention.chosen_rows
_sinkhorn, _spread, _mix = hyper_connection.sinkhorn, hyper_connection.spread, hyper_connection.mix
_swiglu = experts.swiglu


def _half_split(x: Any, positions: Any, table: Any, *, inverse: bool = False) -> Any:
    """Pairs are (i, i + n/2) instead of (2i, 2i + 1): NeMo Automodel 2039."""
    kept, turned = jnp.split(x, [x.shape[-1] - _ROPE], axis=-1)
    order = np.arange(_ROPE).reshape(2, -1).T.reshape(-1)
    back = np.argsort(order)
    both = jnp.concatenate([kept, turned[..., order]], axis=-1)
    result = _rotate(both, positions, table, inverse=inverse)
    return jnp.concatenate([kept, result[..., -_ROPE:][..., back]], axis=-1)


def _leading(x: Any, positions: Any, table: Any, *, inverse: bool = False) -> Any:
    return jnp.flip(_rotate(jnp.flip(x, -1), positions, table, inverse=inverse), -1)


def _leading_in_order(x: Any, positions: Any, table: Any, *, inverse: bool = False) -> Any:
    moved = jnp.roll(x, -_ROPE, axis=-1)
    return jnp.roll(_rotate(moved, positions, table, inverse=inverse), _ROPE, axis=-1)


def _only(which: Callable[[Any, bool], bool], change: Callable[..., Any]) -> Callable[..., Any]:
    """``rotate`` that is wrong for some calls, told apart by the number of axes and the direction."""

    def rotate(x: Any, positions: Any, table: Any, *, inverse: bool = False) -> Any:
        if which(x, inverse):
            return change(x, positions, table, inverse=inverse)
        return _rotate(x, positions, table, inverse=inverse)

    return rotate


def _unrotated(x: Any, positions: Any, table: Any, *, inverse: bool = False) -> Any:
    return x


def _shifted(by: int) -> Callable[..., Any]:
    return lambda x, positions, table, *, inverse=False: _rotate(x, positions + by, table, inverse=inverse)


def _with_table(table: Any) -> Callable[..., Any]:
    return lambda x, positions, _, *, inverse=False: _rotate(x, positions, table, inverse=inverse)


def _times(factor: float) -> Callable[..., Any]:
    """cos and sin times YaRN's attention factor."""

    def rotate(x: Any, positions: Any, table: Any, *, inverse: bool = False) -> Any:
        result = _rotate(x, positions, table, inverse=inverse)
        return jnp.concatenate([result[..., :-_ROPE], result[..., -_ROPE:] * factor], axis=-1)

    return rotate


def _coarse_positions(x: Any, positions: Any, table: Any, *, inverse: bool = False) -> Any:
    return _rotate(x, positions.astype(jnp.bfloat16).astype(jnp.int32), table, inverse=inverse)


def _coarse_table(x: Any, positions: Any, table: Any, *, inverse: bool = False) -> Any:
    rounded = table.astype(ml_dtypes.bfloat16).astype(np.float32)
    return _rotate(x, positions, rounded, inverse=inverse)


_YARN_FACTOR = float(0.1 * np.log(16) + 1)


def _is_query(x: Any, inverse: bool) -> bool:
    return x.ndim == 4 and not inverse


def _is_key(x: Any, inverse: bool) -> bool:
    return x.ndim == 3


def _is_output(x: Any, inverse: bool) -> bool:
    return inverse


# attention


def _scaled_scores(factor: float) -> Callable[..., Any]:
    return lambda q, *others: _attend(q * factor, *others)


def _sink_with_value(q: Any, kv: Any, seen: Any, sink: Any) -> Any:
    """The sink as the probability of the first key."""
    kv = _of_each_query(q, kv)
    scores = _einsum_f32("bshc,bsxc->bhsx", q, kv) * q.shape[-1] ** -0.5
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    sinks = jnp.broadcast_to(sink[None, :, None, None], (*scores.shape[:3], 1))
    shares = jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1), axis=-1)
    shares = shares[..., :-1].at[..., 0].add(shares[..., -1])
    return _einsum_f32("bhsx,bsxc->bshc", shares, kv)


def _of_each_query(q: Any, kv: Any) -> Any:
    """The keys of every query, those of all queries repeated."""
    own = [part if part.ndim == 4 else jnp.broadcast_to(part[:, None], (*q.shape[:2], *part.shape[1:])) for part in kv]
    return jnp.concatenate(own, axis=2)


def _coarse_shares(q: Any, kv: Any, seen: Any, sink: Any) -> Any:
    return _attend(q.astype(jnp.bfloat16).astype(q.dtype), kv, seen, sink)


def _blocks(offset: int) -> Callable[[Any, int], Any]:
    """The causal threshold of compressed entries, moved by some tokens."""
    return lambda token, ratio: (token + 1 + offset) // ratio


def _all_blocks(token: Any, ratio: int) -> Any:
    return jnp.full_like(token, token.shape[1] // ratio)


def _shared_choice(chosen: Any, entries: int) -> Any:
    """Every query sees the entries that any query chose: transformers 45758."""
    mask = _chosen_mask(chosen, entries)
    return jnp.broadcast_to(mask.any(axis=1, keepdims=True), mask.shape)


def _everything_chosen(chosen: Any, entries: int) -> Any:
    return jnp.ones((*chosen.shape[:2], entries), bool)


def _nothing_chosen(chosen: Any, entries: int) -> Any:
    return jnp.zeros((*chosen.shape[:2], entries), bool)


def _group_reversed(x: Any, w: Any) -> Any:
    return _einsum_f32("bsgi,gio->bsgo", x[:, :, ::-1], w)


def _heads_across_groups(x: Any, w: Any) -> Any:
    """Heads dealt out to the groups in turn instead of in runs."""
    batch, tokens, groups, inner = x.shape
    dealt = x.reshape(batch, tokens, -1, groups, 16).swapaxes(2, 3).reshape(batch, tokens, groups, inner)
    return _einsum_f32("bsgi,gio->bsgo", dealt, w)


# compressor


def _previous(change: Callable[[Any, Any, float], tuple[Any, Any]]) -> Callable[[Any, float], Any]:
    """The two halves of the overlapping rows, made in another way."""

    def with_previous(rows: Any, nothing: float) -> Any:
        for_next, own = jnp.split(rows, 2, axis=-1)
        return jnp.concatenate(change(for_next, own, nothing), axis=2)

    return with_previous


def _after(rows: Any, nothing: float, *, back: bool = False) -> Any:
    pad = ((0, 0), (0, 1), (0, 0), (0, 0)) if back else ((0, 0), (1, 0), (0, 0), (0, 0))
    padded = jnp.pad(rows, pad, constant_values=nothing)
    return padded[:, 1:] if back else padded[:, : rows.shape[1]]


_pool = compressor.Compressor._pool


def _ape_on_values(self: Any, values: Any, gates: Any) -> Any:
    return _pool(self, values + self.ape[...], gates - self.ape[...])


def _softmax_over_channels(self: Any, values: Any, gates: Any) -> Any:
    gates = gates + self.ape[...]
    return jnp.sum(values * jax.nn.softmax(gates, axis=-1), axis=2)


def _mean_pool(self: Any, values: Any, gates: Any) -> Any:
    return jnp.mean(values, axis=2)


# indexer


def _scores(*, relu: bool = True, scale: bool = True, heads: bool = True) -> Callable[..., Any]:
    def scores(self: Any, q: Any, keys: Any, weights: Any) -> Any:
        affinity = _einsum_f32("bshc,btc->bsht", q, keys)
        affinity = (jax.nn.relu(affinity) if relu else affinity) * (self.head_dim**-0.5 if scale else 1)
        return jnp.sum(affinity * (weights * (self.heads**-0.5 if heads else 1))[..., None], axis=2)

    return scores


def _one_fewer(scores: Any, visible: Any, topk: int) -> Any:
    best = _choose(scores, visible, topk - 1)
    return jnp.pad(best, ((0, 0), (0, 0), (0, 1)), constant_values=-1)


def _not_causal(scores: Any, visible: Any, topk: int) -> Any:
    """The causal mask of the indexer missing: transformers 45820."""
    return _choose(scores, jnp.ones_like(visible), topk)


def _latest(scores: Any, visible: Any, topk: int) -> Any:
    """The most recent entries instead of the best."""
    return _choose(jnp.broadcast_to(jnp.arange(scores.shape[-1], dtype=scores.dtype), scores.shape), visible, topk)


def _worst(scores: Any, visible: Any, topk: int) -> Any:
    return _choose(-scores, visible, topk)


# hyper-connections


def _rows_last(logits: Any, iterations: int, eps: float) -> Any:
    """Columns and rows in the other order."""
    return jnp.swapaxes(_sinkhorn(jnp.swapaxes(logits, -1, -2), iterations, eps), -1, -2)


def _softmax_only(logits: Any, iterations: int, eps: float) -> Any:
    return jax.nn.softmax(logits, axis=-1) + eps


def _eps_forgotten_in_sinkhorn(logits: Any, iterations: int, eps: float) -> Any:
    return _sinkhorn(logits, iterations, 0.0)


def _comb_transposed(output: Any, streams: Any, mixing: Any) -> Any:
    """Megatron-LM 4957."""
    return _spread(output, streams, mixing._replace(comb=jnp.swapaxes(mixing.comb, -1, -2)))


def _no_mixing(output: Any, streams: Any, mixing: Any) -> Any:
    return mixing.post[..., None] * output[..., None, :] + streams


def _no_post(output: Any, streams: Any, mixing: Any) -> Any:
    return _spread(output, streams, mixing._replace(post=jnp.ones_like(mixing.post)))


class _TapsThatChange(Taps):
    """Changes one value on its way into its tap, as if it had been computed so."""

    def __init__(self, inner: Taps, name: str, change: Callable[[Any], Any]) -> None:
        super().__init__(inner._wanted, inner._overrides, inner._prefix)
        self.values = inner.values
        self._name = name
        self._change = change

    def __call__(self, name: str, value: Any) -> Any:
        return super().__call__(name, self._change(value) if name == self._name else value)


def _mixed(tap: str, change: Callable[[Any], Any]) -> Callable[..., Any]:
    """``mix`` with one of its results changed."""
    return lambda streams, fn, base, scale, config, taps: _mix(
        streams, fn, base, scale, config, _TapsThatChange(taps, tap, change)
    )


def _unnormed_projection(streams: Any, fn: Any, eps: float) -> Any:
    z = streams.reshape(*streams.shape[:2], -1)
    return _einsum_f32("bsz,mz->bsm", z, fn)


def _norm_per_stream(streams: Any, fn: Any, eps: float) -> Any:
    z = streams * jax.lax.rsqrt(jnp.mean(jnp.square(streams), axis=-1, keepdims=True) + eps)
    return _einsum_f32("bsz,mz->bsm", z.reshape(*z.shape[:2], -1), fn)


def _plain_sum(streams: Any, pre: Any) -> Any:
    return jnp.mean(streams, axis=2)


# experts and routing


def _gate(
    *,
    score: Callable[[Any], Any] = lambda logits: jnp.sqrt(jax.nn.softplus(logits)),
    biased_weights: bool = False,
    normalised: bool = True,
) -> Callable[..., Any]:
    """The router with parts of it different."""

    def call(self: Any, x: Any, token_ids: Any, taps: Any) -> Any:
        scores = score(taps("logits", _einsum_f32("...i,io->...o", x, self.weight[...])))
        biased = scores if self.bias is None else scores + self.bias[...]
        if self.tid2eid is not None:
            chosen = self.tid2eid[...][token_ids]
        else:
            _, chosen = jax.lax.top_k(taps("scores", biased), self.topk)
        chosen = taps("experts", jnp.sort(chosen.astype(jnp.int32), axis=-1))
        weights = jnp.take_along_axis(biased if biased_weights else scores, chosen, axis=-1)
        if normalised:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        return router.Routing(chosen, taps("weights", weights * self.scaling))

    return call


def _gate_clamped_below(gate: Any, up: Any, limit: float) -> Any:
    return _swiglu(jnp.maximum(gate, -limit), up, limit)


def _up_clamped_above_only(gate: Any, up: Any, limit: float) -> Any:
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.minimum(up, limit)


def _clamped_after(gate: Any, up: Any, limit: float) -> Any:
    return jnp.minimum(jax.nn.silu(gate), limit) * jnp.clip(up, -limit, limit)


def _gelu(gate: Any, up: Any, limit: float) -> Any:
    return jax.nn.gelu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


_combine = block.Block.combine


def _without_shared(self: Any, streams: Any, routed: Any, experts: Any, taps: Any) -> Any:
    return _combine(self, streams, routed, experts, _TapsThatChange(taps, "ffn", lambda _: experts))


_experts = forward.Forward._experts


def _unweighted(self: Any, layer: int, routed: Any) -> Any:
    return _experts(
        self, layer, routed._replace(routing=routed.routing._replace(weights=jnp.ones_like(routed.routing.weights)))
    )


def _weights_in_other_order(self: Any, layer: int, routed: Any) -> Any:
    weights = routed.routing.weights[..., ::-1]
    return _experts(self, layer, routed._replace(routing=routed.routing._replace(weights=weights)))


# norms and the model level


def _coarse_norm(x: Any, weight: Any, eps: float) -> Any:
    low = x.astype(jnp.bfloat16)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(low), axis=-1, keepdims=True) + jnp.bfloat16(eps))
    return x * scale.astype(x.dtype) * weight


def _coarse_linear(x: Any, w: Any) -> Any:
    """A matmul whose operands are rounded to bfloat16: the default precision of an accelerator."""
    return _einsum_f32("...i,io->...o", *(a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, w)))


def _layer_norm(x: Any, weight: Any, eps: float) -> Any:
    return _rms_norm(x - jnp.mean(x, axis=-1, keepdims=True), weight, eps)


_embed = backbone.embed


def _scaled_embedding(table: Any, *rest: Any) -> Any:
    return _embed(table * table.shape[-1] ** 0.5, *rest)


def _code(name: str, layer: int | None, tap: str, owner: Any, attribute: str, replacement: Any, **more: Any) -> Fault:
    return Fault(name=name, layer=layer, tap=tap, code={(owner, attribute): replacement}, **more)


def _masked(name: str, layer: int, replacement: Any) -> Fault:
    """A fault of the mask that stands where entries are too few to be gathered."""
    code = {(attention, "gathers"): lambda entries, chosen: False, (attention, "chosen_mask"): replacement}
    return Fault(name=name, layer=layer, tap=_CONTEXT, code=code)


def _rope(name: str, layer: int, tap: str, replacement: Any) -> Fault:
    return _code(name, layer, tap, attention, "rotate", replacement)


def _clamp(name: str, layer: int, replacement: Any) -> Fault:
    return _code(name, layer, "ffn.experts", experts, "swiglu", replacement, or_taps=CLAMPED)


_ENTRIES, _POOLED = "attn.compressor.entries", "attn.compressor.pooled"
_CONTEXT, _CHOSEN, _SCORES = "attn.context", "attn.indexer.chosen", "attn.indexer.scores"
_STREAMS = "hc_attn.streams"

CODE: tuple[Fault, ...] = (
    _rope("rope in halves instead of interleaved", SLIDING, "attn.q_rope", _half_split),
    _rope("rope on the leading channels", CSA, "attn.q_rope", _leading_in_order),
    _rope("rope on the leading channels, mirrored", HCA, "attn.q_rope", _leading),
    _rope("rope turns the other way", SLIDING, "attn.q_rope",
          lambda x, p, t, *, inverse=False: _rotate(x, p, t, inverse=not inverse)),
    _rope("rope positions from 1", CSA, "attn.q_rope", _shifted(1)),
    _rope("queries not rotated", HCA, "attn.q_rope", _only(_is_query, _unrotated)),
    _rope("keys not rotated", SLIDING, "attn.kv_rope", _only(_is_key, _unrotated)),
    _rope("keys one position behind", CSA, "attn.kv_rope", _only(_is_key, _shifted(-1))),
    _rope("inverse rope missing", CSA, "attn.context_unrotated", _only(_is_output, _unrotated)),
    _rope("inverse rope turns forward", SLIDING, "attn.context_unrotated",
          _only(_is_output, lambda x, p, t, *, inverse=False: _rotate(x, p, t))),
    _rope("inverse rope of the other table", HCA, "attn.context_unrotated",
          _only(_is_output, _with_table(_MAIN_TABLE))),
    _rope("YaRN on a sliding layer", SLIDING, "attn.q_rope", _with_table(_SCALED_TABLE)),
    _rope("YaRN's mscale on cos and sin", CSA, "attn.q_rope", _times(_YARN_FACTOR)),
    _rope("positions rounded to bfloat16", HCA, "attn.q_rope", _coarse_positions),
    _code("frequencies rounded to bfloat16", SLIDING, "attn.q_rope", attention, "rotate", _coarse_table,
          model="staged"),
    _rope("both rope tables in one layer: keys by the sliding one (MaxText 4153)", LEARNED_CSA, "attn.kv_rope",
          _only(_is_key, _with_table(_MAIN_TABLE))),
    _code("both rope tables in one layer: entries by the sliding one", HCA, _ENTRIES, compressor, "rotate",
          _with_table(_MAIN_TABLE)),
    _code("compressed entries not rotated (mlx-lm 1189)", HCA, _ENTRIES, compressor, "rotate", _unrotated),
    _code("compressed positions shifted to the end of the block", CSA, _ENTRIES, compressor, "rotate", _shifted(3)),
    _code("compressed positions counted in blocks", LEARNED_CSA, _ENTRIES, compressor, "rotate",
          lambda x, p, t, *, inverse=False: _rotate(x, p // 4, t)),
    _code("indexer's queries not rotated", CSA, "attn.indexer.q_rope", indexer, "rotate", _unrotated),
    _code("indexer by the sliding rope table", LEARNED_CSA, "attn.indexer.q_rope", indexer, "rotate",
          _with_table(_MAIN_TABLE)),
    _code("attention scale missing", SLIDING, _CONTEXT, attention, "attend", _scaled_scores(4.0)),
    _code("YaRN's mscale in the attention scale (Primus 930)", HCA, _CONTEXT, attention, "attend",
          _scaled_scores(_YARN_FACTOR**2)),
    _code("sink attends to the first key", CSA, _CONTEXT, attention, "attend", _sink_with_value),
    _code("queries rounded to bfloat16 for the scores", HCA, _CONTEXT, attention, "attend", _coarse_shares,
          legal="the queries are in bfloat16 already"),
    _code("a query sees the next token", SLIDING, _CONTEXT, attention, "window_mask",
          lambda distance, window: (distance >= -1) & (distance < window)),
    _code("a query does not see itself", CSA, _CONTEXT, attention, "window_mask",
          lambda distance, window: (distance >= 1) & (distance < window)),
    _code("no window: all tokens before", HCA, _CONTEXT, attention, "window_mask",
          lambda distance, window: distance >= 0),
    _code("causal threshold of entries one token early", HCA, _CONTEXT, attention, "complete_blocks", _blocks(1)),
    _code("causal threshold of entries one token late", HCA, _CONTEXT, attention, "complete_blocks", _blocks(-1)),
    _code("causal threshold of CSA entries one token early", CSA, _CHOSEN, attention, "complete_blocks", _blocks(1)),
    _code("causal threshold of CSA entries one token late", LEARNED_CSA, _CHOSEN, attention, "complete_blocks",
          _blocks(-1)),
    _code("block bias ignored: every query sees every entry", HCA, _CONTEXT, attention, "complete_blocks", _all_blocks),
    _masked("chosen entries shared across queries (transformers 45758)", CSA, _shared_choice),
    _masked("choice ignored: all entries seen", LEARNED_CSA, _everything_chosen),
    _masked("compressed entries never seen", CSA, _nothing_chosen),
    _code("each gathered entry is the one after", CSA, _CONTEXT, attention, "chosen_rows",
          lambda values, chosen: _chosen_rows(values, chosen + 1)),
    _code("gathered entries of the first query for all of a chunk", LEARNED_CSA, _CONTEXT, attention, "chosen_rows",
          lambda values, chosen: _chosen_rows(values, jnp.broadcast_to(chosen[:, :1], chosen.shape))),
    _code("gathered entries in another order than their mask", CSA, _CONTEXT, attention, "chosen_rows",
          lambda values, chosen: _chosen_rows(values, chosen)[:, :, ::-1]),
    _code("an absent choice gathers an entry that is seen", LEARNED_CSA, _CONTEXT, attention, "chosen_seen",
          lambda chosen: jnp.ones(chosen.shape, bool)),
    _code("the last chosen entry is not gathered", CSA, _CONTEXT, attention, "chosen_seen",
          lambda chosen: (chosen >= 0).at[:, :, -1].set(False)),
    _code("gathered entries are zeros", LEARNED_CSA, _CONTEXT, attention, "chosen_rows",
          lambda values, chosen: jnp.zeros((*chosen.shape, values.shape[2]), values.dtype)),
    _code("weightless norm of the queries missing", CSA, "attn.q", numerics, "unit_rms", lambda x, eps: x),
    _code("weightless norm over all heads at once", SLIDING, "attn.q", numerics, "unit_rms",
          lambda x, eps: x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=(-1, -2), keepdims=True) + eps)),
    _code("output groups in reverse", HCA, "attn.wo_a", attention, "_grouped_linear", _group_reversed),
    _code("heads dealt out to the groups in turn", CSA, "attn.wo_a", attention, "_grouped_linear",
          _heads_across_groups),
    _code("Ca and Cb swapped in the overlap", CSA, _POOLED, compressor, "_with_previous",
          _previous(lambda a, b, nothing: (_after(b, nothing), a))),
    _code("overlap with the next block", LEARNED_CSA, _POOLED, compressor, "_with_previous",
          _previous(lambda a, b, nothing: (_after(a, nothing, back=True), b))),
    _code("no overlap: both halves of the own block", CSA, _POOLED, compressor, "_with_previous",
          _previous(lambda a, b, nothing: (a, b))),
    _code("padding of the first block masked with 0 instead of -inf", LEARNED_CSA, _POOLED, compressor,
          "_with_previous", _previous(lambda a, b, nothing: (_after(a, 0.0), b))),
    _code("ape added to the values", HCA, _POOLED, compressor.Compressor, "_pool", _ape_on_values),
    _code("softmax over the channels", HCA, _POOLED, compressor.Compressor, "_pool", _softmax_over_channels),
    _code("mean instead of gated pooling", HCA, _POOLED, compressor.Compressor, "_pool", _mean_pool),
    _code("relu of the indexer missing", CSA, _SCORES, indexer.Indexer, "_scores", _scores(relu=False)),
    _code("head width scale of the indexer missing", LEARNED_CSA, _SCORES, indexer.Indexer, "_scores",
          _scores(scale=False)),
    _code("head count scale of the indexer missing", CSA, _SCORES, indexer.Indexer, "_scores", _scores(heads=False)),
    _code("one entry too few chosen", CSA, _CHOSEN, indexer, "choose", _one_fewer),
    _code("causal mask of the indexer missing (transformers 45820)", LEARNED_CSA, _CHOSEN, indexer, "choose",
          _not_causal),
    _code("the latest entries chosen, not the best", CSA, _CHOSEN, indexer, "choose", _latest),
    _code("the lowest index scores chosen", LEARNED_CSA, _CHOSEN, indexer, "choose", _worst),
    _code("comb transposed (Megatron-LM 4957)", CSA, _STREAMS, block, "spread", _comb_transposed),
    _code("streams not mixed", HCA, _STREAMS, block, "spread", _no_mixing),
    _code("post not applied", SLIDING, _STREAMS, block, "spread", _no_post),
    _code("post without the factor 2", CSA, "hc_attn.post", block, "mix", _mixed("post", lambda post: post / 2)),
    _code("post with hc_eps (NeMo Automodel 2039)", HCA, "hc_attn.post", block, "mix",
          _mixed("post", lambda post: post + 2e-3)),
    _code("pre without sigmoid", SLIDING, "hc_attn.pre", block, "mix",
          _mixed("pre", lambda pre: jax.scipy.special.logit(jnp.clip(pre - 2e-3, 1e-6, 1 - 1e-6)))),
    _code("Sinkhorn: rows last", CSA, "hc_attn.comb", hyper_connection, "sinkhorn", _rows_last, or_taps=MIXED),
    _code("Sinkhorn missing", HCA, "hc_attn.comb", hyper_connection, "sinkhorn", _softmax_only, or_taps=MIXED),
    _code("Sinkhorn without eps", SLIDING, "hc_attn.comb", hyper_connection, "sinkhorn", _eps_forgotten_in_sinkhorn,
          or_taps=MIXED),
    _code("hyper-connection without its norm", LEARNED_CSA, "hc_attn.pre", hyper_connection, "_project",
          _unnormed_projection, or_taps=PROJECTED),
    _code("hyper-connection normed per stream", CSA, "hc_attn.pre", hyper_connection, "_project", _norm_per_stream,
          or_taps=PROJECTED),
    _code("streams averaged, not weighted", CSA, "hc_attn.collapsed", hyper_connection, "_collapse", _plain_sum),
    _code("sqrtsoftplus without the root", SLIDING, "ffn.gate.weights", router.Router, "__call__",
          _gate(score=jax.nn.softplus)),
    _code("router scores by sigmoid", HCA, "ffn.gate.scores", router.Router, "__call__", _gate(score=jax.nn.sigmoid)),
    _code("router scores by softmax", CSA, "ffn.gate.weights", router.Router, "__call__",
          _gate(score=jax.nn.softmax)),
    _code("router bias added to the weights", LEARNED_CSA, "ffn.gate.weights", router.Router, "__call__",
          _gate(biased_weights=True)),
    _code("routing weights not normalised", HCA, "ffn.gate.weights", router.Router, "__call__",
          _gate(normalised=False)),
    _clamp("gate clamped on the wrong side too", CSA, _gate_clamped_below),
    _clamp("up clamped on one side only", HCA, _up_clamped_above_only),
    _clamp("gate clamped after silu", SLIDING, _clamped_after),
    _clamp("gelu instead of silu", LEARNED_CSA, _gelu),
    _code("shared expert forgotten", SLIDING, "ffn", block.Block, "combine", _without_shared),
    _code("experts not weighted", CSA, "ffn.experts", forward.Forward, "_experts", _unweighted),
    _code("weights and experts in different order", HCA, "ffn.experts", forward.Forward, "_experts",
          _weights_in_other_order),
    _code("norm statistics in bfloat16", CSA, "attn.q_norm", attention, "rms_norm", _coarse_norm,
          legal="the scale of a row errs by a rounding or two, as each of its elements does"),
    _code("layer norm instead of RMS norm", HCA, "attn.q_norm", attention, "rms_norm", _layer_norm),
    _code("matmul at an accelerator's default precision", SLIDING, "attn.wq_a", numerics, "product",
          lambda x, w, dtype: _coarse_linear(x, w), legal="both operands are in bfloat16 already"),
    _code("router matmul at default precision", LEARNED_CSA, "ffn.gate.logits", router, "linear", _coarse_linear,
          legal="both operands are in bfloat16 already"),
    _code("embedding scaled by sqrt(D)", None, "embed", forward, "embed", _scaled_embedding),
    _code("head collapse by the mean", None, "hc_head", hyper_connection, "_collapse", _plain_sum),
    _code("final norm missing", None, "norm", backbone, "rms_norm", lambda x, weight, eps: x),
    _code("output head at default precision", None, "logits", backbone, "linear", _coarse_linear,
          legal="both operands are in bfloat16 already"),
)  # fmt: skip
