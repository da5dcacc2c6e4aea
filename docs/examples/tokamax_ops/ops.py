"""Each op of tokamax on the golden's own taps: a table of ops, and for each a function from taps to taps.

Inputs are the golden's taps and the model's weights; an op never gets the output of another one. The golden has one
prompt and the widths that the kernels are written for (config.json).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokamax import ops

from dsv4_convert.model.rope import frequencies
from dsv4_convert.spec.v4.kinds import AttentionKind

from .caches import (
    PAGE,
    as_words,
    fp8,
    pack_entries,
    pack_keys,
    pack_states,
    room_for,
    unpack_dense,
    unpack_entries,
    unpack_gathered,
    unpack_keys,
    unpack_states,
)

#: Rows that csa_gather and sparse_mla take at a time; fewer are filled up.
BLOCK = 128
CSA, HCA = AttentionKind.CSA, AttentionKind.HCA
#: The largest relative rms that rounding to FP8 gives: half a step of 3 bits of mantissa, evenly spread.
FP8_RMS = 2.0**-4 / 3**0.5
#: Where an op has another name for an implementation than the others.
SPELLED = {(ops.lightning_indexer, "mosaic_tpu"): "mosaic"}


class Layer:
    """One layer of a golden, its weights, and the implementation that is checked."""

    def __init__(self, golden, read, number, implementation):
        self.golden, self.read, self.number, self.implementation = golden, read, number, implementation
        self.cfg = golden.config
        self.positions = np.ascontiguousarray(golden.positions[0])
        self.kind = self.cfg.attention[number]
        self.ratio = self.cfg.ratio(self.kind) if self.kind in (CSA, HCA) else None

    def tap(self, name):
        """The first prompt's tap, float32 or int32 ``[S, ...]``."""
        return self.golden.golden.read(f"layers.{self.number}.{name}")[0]

    def weight(self, name):
        """A weight of the layer, matrices as ``[in, out]``."""
        return np.asarray(self.read(f"layers.{self.number}.{name}"), np.float32)

    def rotary(self):
        """``[cos | sin]`` of every position: base and YaRN of the layer's kind, in float32 as published."""
        turns = frequencies(self.cfg, compressed=self.ratio is not None)
        angles = np.arange(self.positions[-1] + 1, dtype=np.float32)[:, None] * turns
        return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)

    def call(self, op, *arguments, **options):
        """An op in the implementation that is checked, on JAX's arrays."""
        arguments, options = jax.tree.map(
            lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, (arguments, options)
        )
        name = SPELLED.get((op, self.implementation), self.implementation)
        return op(*arguments, **options, implementation=name)

    def entries(self):
        """Positions of the first token of every complete block."""
        return self.positions[self.ratio - 1 :: self.ratio] // self.ratio * self.ratio


@dataclasses.dataclass(frozen=True)
class Op:
    """How an op is checked: ``run(layer, dtype)`` gives taps by name; in layers of these kinds, in these dtypes.

    ``fp8``: the op rounds to FP8, which the golden does not do, and whose error is beyond the noise of bfloat16.
    """

    run: Callable[[Layer, Any], dict[str, Any]]
    kinds: tuple[AttentionKind, ...] = (CSA, HCA)
    dtypes: tuple[str, ...] = ("bfloat16",)
    fp8: bool = False

    def agrees(self, report):
        """Whether every tap is within the limits of its dtype, or within the rounding of FP8."""
        if self.fp8:
            return all(tap.distance is not None and tap.distance.relative_rms <= FP8_RMS for tap in report.taps)
        return report.passed


def mhc_pre(layer, dtype):
    found = {}
    for half, streams in (("hc_attn", "input"), ("hc_ffn", "hc_attn.streams")):
        flat = layer.tap(streams).reshape(len(layer.positions), -1).astype(dtype)
        post, comb, collapsed = layer.call(ops.mhc_pre, flat, *_gates(layer, half))
        found |= {f"{half}.post": post, f"{half}.comb": comb, f"{half}.collapsed": collapsed}
    return found


def _gates(layer, half):
    cfg = layer.cfg
    weights = (layer.weight(f"{half}_{part}") for part in ("fn", "scale", "base"))
    return *weights, cfg.rms_norm_eps, cfg.hc_eps, cfg.hc_eps, 2.0, cfg.hc_sinkhorn_iters


def _mixing(layer, half, output, streams, dtype):
    flat = layer.tap(streams).reshape(len(layer.positions), -1).astype(dtype)
    return layer.tap(output).astype(dtype), flat, layer.tap(f"{half}.post"), layer.tap(f"{half}.comb")


def mhc_post(layer, dtype):
    found = {}
    for half, output, streams in (("hc_attn", "attn.wo_b", "input"), ("hc_ffn", "ffn", "hc_attn.streams")):
        mixing = _mixing(layer, half, output, streams, dtype)
        new = layer.call(ops.mhc_post, *mixing)
        found[f"{half}.streams"] = new.reshape(layer.tap(streams).shape)
    return found


def mhc_fused_post_pre(layer, dtype):
    mixing = _mixing(layer, "hc_attn", "attn.wo_b", "input", dtype)
    new, post, comb, collapsed = layer.call(ops.mhc_fused_post_pre, *mixing, *_gates(layer, "hc_ffn"))
    streams = new.reshape(layer.tap("input").shape)
    return {"hc_attn.streams": streams, "hc_ffn.post": post, "hc_ffn.comb": comb, "hc_ffn.collapsed": collapsed}


def rope(layer, dtype):
    """Queries, keys, entries, and the context, which is turned back."""

    def turned(name, positions, inverse=False):
        x = jnp.asarray(layer.tap(name), dtype)
        return layer.call(ops.deepseek_rope, x, positions, layer.rotary(), inverse=inverse)

    found = {
        "attn.q_rope": turned("attn.q", layer.positions),
        "attn.kv_rope": turned("attn.kv_norm", layer.positions),
        "attn.compressor.entries": turned("attn.compressor.norm", layer.entries()),
        "attn.context_unrotated": turned("attn.context", layer.positions, inverse=True),
    }
    if layer.kind is CSA:
        found["attn.indexer.compressor.entries"] = turned("attn.indexer.compressor.norm", layer.entries())
    return found


def qnorm_rope(layer, dtype):
    q = jnp.asarray(layer.tap("attn.wq_b"), dtype)
    return {
        "attn.q_rope": layer.call(
            ops.deepseek_rope,
            q,
            layer.positions,
            layer.rotary(),
            mode="qnorm_rope",
            eps=layer.cfg.rms_norm_eps,
        )
    }


def rope_quant(layer, dtype):
    """Queries of the indexer, in FP8 with one scale per head."""
    low_rank = jnp.asarray(layer.tap("attn.q_norm"))
    q = jnp.matmul(low_rank, layer.weight("attn.indexer.wq_b"), precision="highest").astype(dtype)
    codes, scale = layer.call(
        ops.deepseek_rope,
        q.reshape(len(q), -1, layer.cfg.index_head_dim),
        layer.positions,
        layer.rotary(),
        mode="rope_quant",
    )
    return {"attn.indexer.q_rope": (codes.astype(np.float32) * scale[..., None]).astype(dtype)}


def proj_and_save_state(layer, dtype):
    found = _projected(layer, "attn.compressor", 128, dtype)
    return found | (_projected(layer, "attn.indexer.compressor", 256, dtype) if layer.kind is CSA else {})


def _projected(layer, path, lanes, dtype):
    matrix = np.concatenate([layer.weight(f"{path}.wkv"), layer.weight(f"{path}.wgate")], axis=1)
    ape, (tokens, width) = layer.weight(f"{path}.ape"), (len(layer.positions), matrix.shape[1])
    cache = pack_states(np.zeros((tokens, width), np.float32), lanes)
    first_row = np.arange(tokens, dtype=np.int32) * (width // lanes)
    cache = layer.call(
        ops.proj_and_save_state,
        layer.tap("attn_norm").astype(dtype),
        matrix.astype(dtype),
        ape,
        layer.positions,
        first_row,
        cache,
        compress_ratio=layer.ratio,
    )
    values, gates = np.split(unpack_states(np.asarray(cache), width)[:tokens], 2, axis=1)
    return {f"{path}.wkv": values, f"{path}.wgate": gates - ape[layer.positions % layer.ratio]}


def csa_compressor(layer, dtype):
    """Entries in FP8, in the cache that holds the states too."""
    states = _states(layer, "attn.compressor")
    pages = pack_states(states)
    cache = as_words(np.concatenate([pages, room_for(pages, len(states))]))
    rotated = np.zeros((len(cache), PAGE // 4, 128), np.int32)
    slots = _slots(layer, first=len(pages) * PAGE)
    found = _compress(layer, "attn.compressor", cache, slots, pages, 128, rope_cache=rotated)
    entries = unpack_entries(*(np.asarray(part)[len(pages) :] for part in found))
    return {"attn.compressor.entries": entries[: len(layer.entries())].astype(dtype)}


def hca_compressor(layer, dtype):
    """Entries in bfloat16, two rows each, in a cache of their own."""
    states = _states(layer, "attn.compressor")
    pages = pack_states(states)
    cache, slots = room_for(pages, len(states)), _slots(layer, rows=2)
    found, _ = _compress(layer, "attn.compressor", cache, slots, pages, 128, state_cache=pages)
    return {"attn.compressor.entries": unpack_dense(np.asarray(found))[: len(layer.entries())].astype(dtype)}


def indexer_compressor(layer, dtype):
    """Keys in FP8 without the rotation by a Hadamard matrix, four in a row of the cache that holds the states too."""
    path = "attn.indexer.compressor"
    states = _states(layer, path)
    pages = pack_states(states, 256)
    cache = np.concatenate([pages, room_for(pages, len(states))])
    slots = _slots(layer, first=len(pages) * PAGE * 4)
    found, _ = _compress(layer, path, cache, slots, pages, 256, quant_block=128)
    return {f"{path}.entries": unpack_keys(np.asarray(found)[len(pages) :])[: len(layer.entries())].astype(dtype)}


def _states(layer, path):
    """Values and gates of every token, the position bias in the gates: ``[S, 2 W]``."""
    gates = layer.tap(f"{path}.wgate") + layer.weight(f"{path}.ape")[layer.positions % layer.ratio]
    return np.concatenate([layer.tap(f"{path}.wkv"), gates], axis=1)


def _slots(layer, first=0, rows=1):
    """Where the entry of each token goes: that of the last token of every block; -1 for the others."""
    complete = (layer.positions + 1) % layer.ratio == 0
    return np.where(complete, first + layer.positions // layer.ratio * rows, -1).astype(np.int32)


def _compress(layer, path, cache, slots, pages, lanes, **caches):
    """One prompt, whose states lie in pages of their own, in order."""
    rows = 2 * layer.tap(f"{path}.wkv").shape[1] // lanes
    return layer.call(
        ops.dsv4_compressor,
        cache,
        layer.positions,
        np.arange(len(pages), dtype=np.int32),
        np.zeros(len(slots), np.int32),
        slots,
        layer.weight(f"{path}.norm"),
        cos_sin_cache=layer.rotary(),
        block_table_stride=len(pages),
        state_block_size=PAGE // rows,
        compress_ratio=layer.ratio,
        overlap=layer.kind is CSA,
        rms_eps=layer.cfg.rms_norm_eps,
        **caches,
    )


def lightning_indexer(layer, dtype):
    """One token at a time: each is a request of its own, and all share the keys of the prompt."""
    tokens = len(layer.positions)
    return _indexed(layer, dtype, np.arange(1, tokens + 1), np.arange(tokens + 1), decoding=tokens)


def lightning_indexer_of_a_prompt(layer, dtype):
    """The whole prompt as one request, in which a token sees the block that it is in before that is complete."""
    tokens = len(layer.positions)
    return _indexed(layer, dtype, [tokens], [0, tokens], decoding=0)


def _indexed(layer, dtype, lengths, starts, decoding):
    cfg, cache = layer.cfg, pack_keys(layer.tap("attn.indexer.compressor.entries"))
    weights = layer.tap("attn.indexer.weights_proj") * (cfg.index_n_heads * cfg.index_head_dim) ** -0.5
    requests = len(lengths)
    chosen = layer.call(
        ops.lightning_indexer,
        layer.tap("attn.indexer.q_rope").astype(dtype),
        weights.astype(dtype),
        cache,
        np.asarray(lengths, np.int32),
        np.tile(np.arange(len(cache), dtype=np.int32), requests),
        np.asarray(starts, np.int32),
        np.asarray([decoding, requests, requests], np.int32),
        k=layer.tap("attn.indexer.chosen").shape[1],
        compression_ratio=layer.ratio,
    )
    return {"attn.indexer.chosen": chosen}


def csa_gather(layer, dtype):
    """Every entry once, last first. The rounding of the cache is not the op's error, so it is taken off."""
    entries = layer.tap("attn.compressor.entries")
    cache = pack_entries(entries)
    order = np.arange(len(entries), dtype=np.int32)[::-1]
    indices = np.pad(order, (0, -len(order) % BLOCK))
    found = layer.call(ops.csa_gather, *cache, indices, top_k=BLOCK)
    gathered = unpack_gathered(*map(np.asarray, found), BLOCK)[: len(order)][::-1]
    return {"attn.compressor.entries": entries + (gathered - unpack_entries(*cache)[: len(entries)])}


def sparse_mla(layer, dtype):
    """The chosen entries, added to what plain JAX makes of the window."""
    cfg, position = layer.cfg, layer.positions
    q, kv = jnp.asarray(layer.tap("attn.q_rope"), dtype), jnp.asarray(layer.tap("attn.kv_rope"))
    scale = cfg.head_dim**-0.5
    scores = jnp.einsum("thc,kc->thk", q.astype(np.float32), kv, precision="highest") * scale
    ago = position[:, None] - position
    scores = jnp.where(((ago >= 0) & (ago < cfg.sliding_window))[:, None], scores, -jnp.inf)
    largest = scores.max(-1)
    share = jnp.exp(scores - largest[..., None])
    chosen = layer.tap("attn.indexer.chosen")
    cache = pack_entries(layer.tap("attn.compressor.entries"))
    return {
        "attn.context": layer.call(
            ops.sparse_mla,
            q,
            *cache,
            np.pad(chosen, ((0, 0), (0, -chosen.shape[1] % BLOCK)), constant_values=-1),
            np.arange(len(cache[0]), dtype=np.int32),
            np.asarray([0, len(position)], np.int32),
            np.asarray([0, 1, 1], np.int32),
            layer.weight("attn.attn_sink"),
            jnp.einsum("thk,kc->thc", share, kv, precision="highest").astype(dtype),
            share.sum(-1),
            largest,
            sm_scale=scale,
        )
    }


def grouped_lowrank_proj(layer, dtype, quantize_activations=False):
    """``wo_a`` as FP8 codes with one scale per column, which are its values exactly."""
    groups, width, rank = (matrix := layer.weight("attn.wo_a")).shape
    matrix = matrix.swapaxes(0, 1).reshape(width, groups * rank)
    codes, scale = fp8(matrix, axis=0)
    assert np.array_equal(codes.astype(np.float32) * scale, matrix), "wo_a: not exact in FP8 with a scale per column"
    output = layer.call(
        ops.grouped_lowrank_proj,
        layer.tap("attn.context").astype(dtype),
        layer.positions,
        layer.rotary(),
        codes,
        scale,
        quantize_activations=quantize_activations,
    )
    return {"attn.wo_a": output.reshape(-1, groups, rank)}


def grouped_lowrank_proj_in_fp8(layer, dtype):
    """As the op does it if nothing is said; the release leaves this projection in bfloat16."""
    return grouped_lowrank_proj(layer, dtype, quantize_activations=True)


def router_topk(layer, dtype):
    """The experts. Its weights are the scores with the bias, which V4 does not weigh by."""
    scores = layer.tap("ffn.gate.scores").astype(dtype)
    return {"ffn.gate.experts": layer.call(ops.router_topk, scores, layer.cfg.num_experts_per_tok)[1]}


def ragged_dot(layer, dtype):
    """The routed experts: tokens in order of expert through three grouped products, the clamp between them."""
    x, experts, weights = (layer.tap(name) for name in ("ffn_norm", "ffn.gate.experts", "ffn.gate.weights"))
    order = np.argsort(experts.reshape(-1), kind="stable")
    token = order // experts.shape[1]
    sizes = np.bincount(experts.reshape(-1), minlength=layer.cfg.n_routed_experts).astype(np.int32)

    def product(rows, name):
        matrices = layer.weight(f"ffn.experts.{name}").astype(dtype)
        return layer.call(
            ops.ragged_dot,
            jnp.asarray(rows, dtype),
            matrices,
            sizes,
            precision="highest",
            preferred_element_type=np.float32,
        )

    limit = layer.cfg.swiglu_limit
    gate, up = jnp.minimum(product(x[token], "w1"), limit), jnp.clip(product(x[token], "w3"), -limit, limit)
    output = product(gate / (1 + jnp.exp(-gate)) * up, "w2") * weights.reshape(-1)[order][:, None]
    return {"ffn.experts": jnp.zeros(x.shape, np.float32).at[token].add(output).astype(dtype)}


#: Every check, named as its row in docs/tokamax.md.
OPS = {
    "mhc_pre": Op(mhc_pre),
    "mhc_post": Op(mhc_post),
    "mhc_fused_post_pre": Op(mhc_fused_post_pre),
    "deepseek_rope": Op(rope, dtypes=("float32", "bfloat16")),
    "deepseek_rope, qnorm_rope": Op(qnorm_rope, dtypes=("float32", "bfloat16")),
    "deepseek_rope, rope_quant": Op(rope_quant, (CSA,), fp8=True),
    "proj_and_save_state": Op(proj_and_save_state),
    "dsv4_compressor, CSA": Op(csa_compressor, (CSA,), fp8=True),
    "dsv4_compressor, HCA": Op(hca_compressor, (HCA,)),
    "dsv4_compressor, indexer": Op(indexer_compressor, (CSA,), fp8=True),
    "lightning_indexer, decoding": Op(lightning_indexer, (CSA,)),
    "csa_gather": Op(csa_gather, (CSA,), ("float32",)),
    "sparse_mla": Op(sparse_mla, (CSA,)),
    "grouped_lowrank_proj": Op(grouped_lowrank_proj),
    "grouped_lowrank_proj, quantize_activations": Op(grouped_lowrank_proj_in_fp8, fp8=True),
    "router_topk": Op(router_topk, dtypes=("float32",)),
    "ragged_dot": Op(ragged_dot, dtypes=("float32", "bfloat16")),
}

#: Uses of ops that disagree with the golden; docs/tokamax.md says why.
MISFITS = {"lightning_indexer, prompt": Op(lightning_indexer_of_a_prompt, (CSA,))}
