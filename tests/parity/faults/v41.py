"""Faults of DeepSeek-V4.1: its engrams, what layers share, the weights carried ahead, and its shared parts with V4."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from dsv4_convert.model import attention as windowed
from dsv4_convert.model import block as decoder
from dsv4_convert.model import experts, hyper_connection, indexer, router
from dsv4_convert.model import model as whole
from dsv4_convert.model.v41 import attention, block, compressor, engram
from dsv4_convert.model.v41 import indexer as shared_indexer
from dsv4_convert.model.v41 import model as backbone
from dsv4_convert.spec.config import Config

from ...edits import edited
from .decoding import _nibbles_reversed, _where
from .fault import V41_MODEL, Array, Arrays, Fault
from .weights import _both, _change, _copy, _one, _swap, _transposed

#: The layers of the model: window only without and with an engram, a source of keys and a reader for pairs of tokens,
#: the source of keys and of candidates, with an engram, a reader, and a layer that chooses inside the candidates.
WINDOW, NGRAMS, SOURCE, READER, CANDIDATES, LATE_READER, CHOOSER = range(7)
_YARN = Config.from_hf(V41_MODEL).yarn
assert _YARN is not None


def _edit(
    name: str, layer: int | None, tap: str, owner: Any, function: str, old: str, new: str, **more: Any
) -> Fault:  # fmt: skip
    code = {(owner, function): edited(owner, function, old, new)}
    return Fault(name=name, layer=layer, tap=tap, code=code, **more)


def _of(name: str, layer: int | None, tap: str, config: dict[str, Any]) -> Fault:
    return Fault(name=name, layer=layer, tap=tap, config=config)


def _engram(name: str, tap: str, function: str, old: str, new: str) -> Fault:
    """A fault of the class or of a function of the module, in the first engram."""
    owner = engram.Engram if hasattr(engram.Engram, function) else engram
    return _edit(name, NGRAMS, f"engram.{tap}", owner, function, old, new)


def _resized(target: str, source: str) -> Callable[[Arrays], object]:
    """A table with the rows of another one, as many as it has."""
    return lambda arrays: arrays.update({target: np.resize(arrays[source], arrays[target].shape)})


def _tensor(name: str, layer: int, tap: str, pattern: str, change: Callable[[Array], Array], **more: Any) -> Fault:
    return Fault(name=name, layer=layer, tap=tap, tensor=_where(pattern, change), **more)


_TABLE = "layers.1.engram.embed"
_ENGRAM_VALUE = ("engram.key", "engram.value")
_ROWS = "rows = rows.astype(streams.dtype)"
_HISTORY = "self.token_map[...][jnp.where(history < 0, self.pad, history)]"

ENGRAM: tuple[Fault, ...] = (
    _engram("the same primes for n-grams of every size", "ids", "ngram_hash",
            "engram.vocab_size), first, first + engram.columns))",
            "engram.vocab_size), engram.n_heads)) * (engram.max_ngram_size - 1)"),
    _engram("the other engram's hash", "ids", "ngram_hash", "engram.tables[index]", "1 - engram.tables[index]"),
    _engram("multipliers by the engram's number", "ids", "ngram_hash", "engram.published_layer_ids[table]", "table"),
    _engram("multipliers not odd", "ids", "ngram_hash", "2 * int(number) + 1", "2 * int(number)"),
    _engram("ids joined without multipliers", "ids", "ngram_rows", "ngrams.multipliers[distance])", "1)"),
    _engram("products added instead of joined by exclusive or", "ids", "ngram_rows", "one ^ limb", "one + limb"),
    _engram("n-grams of the tokens that follow", "ids", "ngram_rows", "first = look_back - distance",
            "first = distance - 1"),
    _engram("offsets of the parts forgotten", "ids", "ngram_rows", "primes) + offsets", "primes)"),
    _engram("offsets of the next part", "ids", "ngram_rows", "primes) + offsets", "primes) + np.roll(offsets, -1)"),
    _engram("look-back past the start finds the first token", "ids", "wanted_rows",
            "jnp.where(history < 0, self.pad, history)", "jnp.where(history < 0, token_ids[:, :1], history)"),
    _engram("token ids not mapped", "ids", "wanted_rows", _HISTORY, "jnp.where(history < 0, self.pad, history)"),
    _engram("the pad id not mapped", "ids", "wanted_rows", _HISTORY,
            "jnp.where(history < 0, self.pad, self.token_map[...][history])"),
    _engram("rows side by side in reverse", "key", "__call__", _ROWS, "rows = rows[:, :, ::-1].astype(streams.dtype)"),
    _engram("every token has the rows of the one before", "key", "__call__", _ROWS,
            "rows = jnp.roll(rows, 1, axis=1).astype(streams.dtype)"),
    _engram("the value before the keys", "key", "__call__",
            "key, value = jnp.split(both, [count * width], axis=-1)",
            "value, key = jnp.split(both, [width], axis=-1)"),
    _engram("gate without the square root", "gate", "_gate", "jnp.sqrt(jnp.maximum(jnp.abs(match), _LEAST))",
            "jnp.abs(match)"),
    _engram("gate without the sign", "gate", "_gate", "jnp.copysign(", "jnp.maximum("),
    _engram("gate not scaled by the width", "gate", "_gate", " * h.shape[-1] ** -0.5", ""),
    _engram("engram's norm over all streams", "gate", "_gate", "rms_scale(h, self.eps)",
            "rms_scale(h.reshape(*h.shape[:2], -1), self.eps)[..., None]"),
    _engram("keys not normed", "gate", "_gate", " * rms_scale(key, self.eps))", ")"),
    _engram("engram's eps 1e-6", "gate", "_gate", "rms_scale(key, self.eps)", "rms_scale(key, 1e-6)"),
    _engram("value added without its gate", "streams", "__call__", "gate[..., None] * value", "value"),
    _engram("value added to the first stream alone", "streams", "__call__", "gate[..., None] * value[:, :, None]",
            "gate.at[..., 1:].set(0)[..., None] * value[:, :, None]"),
    _engram("gates of the streams in reverse", "streams", "__call__", "gate[..., None]", "gate[..., ::-1, None]"),
    Fault(name="engram tables swapped", layer=NGRAMS, tap="engram.key", or_taps=_ENGRAM_VALUE,
          arrays=_resized(_TABLE, "layers.4.engram.embed")),
    Fault(name="engram rows off by one", layer=NGRAMS, tap="engram.key", or_taps=_ENGRAM_VALUE,
          arrays=_change(_TABLE, lambda a: np.roll(a, 1, 0))),
    _one("engram's q_weight left at ones", NGRAMS, "engram.q_weight", "engram.gate", np.ones_like),
    _one("streams of the engram's k_weight in reverse", CANDIDATES, "engram.k_weight", "engram.gate",
         lambda a: a[::-1]),
    _one("rows of the engram's wkv rolled by a table row", CANDIDATES, "engram.wkv", "engram.key",
         lambda a: np.roll(a, 64, 0)),
    _tensor("scales of the engram's rows shifted by a row", NGRAMS, "engram.key",
            r"layers\.1\.engram\.embed\.scale", lambda a: np.roll(a, 1, 0), or_taps=_ENGRAM_VALUE),
    _tensor("scales of the engram's rows shifted by a group", CANDIDATES, "engram.key",
            r"layers\.4\.engram\.embed\.scale", lambda a: np.roll(a, 1, 1), or_taps=_ENGRAM_VALUE),
)  # fmt: skip

_ATTEND, _CARRY = "attend", "return Carry(streams, mixing.pre, shared), cache"

CARRIED: tuple[Fault, ...] = (
    _edit("pre of the same half in the attention", NGRAMS, "hc_attn.collapsed", block.V41Block, _ATTEND,
          "self._attention_input(streams, pre, taps)", "self._attention_input(streams, mixing.pre, taps)"),
    _edit("pre of the same half in the experts", SOURCE, "hc_ffn.collapsed", block.V41Block, "route",
          "self._expert_input(carry.streams, carry.pre, taps)", "self._expert_input(carry.streams, mixing.pre, taps)"),
    _edit("the layer's own input weights the experts' input too", READER, "hc_ffn.collapsed", block.V41Block, _ATTEND,
          _CARRY, "return Carry(streams, pre, shared), cache"),
    _edit("pre before the engram's streams", NGRAMS, "hc_attn.pre", block.V41Block, _ATTEND,
          "mixing = self._attention_mix(streams, taps)", "mixing = self._attention_mix(carry.streams, taps)"),
    _edit("the attention's pre handed on by the experts", READER, "input.pre", block.V41Block, "combine",
          "routed.mixing.pre", "carry.pre", runs=SOURCE),
    _edit("the first half takes the mean of the streams", WINDOW, "input.pre", backbone.V41Model, "enter",
          ".at[..., 0].set(1)", " + 0.25", runs=-1),
    _edit("the mean of the streams before the head", None, "hc_head.collapsed", backbone.V41Model, "collapse",
          "carry.pre,", "0 * carry.pre + 0.25,"),
    _edit("entries of the source before handed on", LATE_READER, "input.entries", block.V41Block,
          _ATTEND, _CARRY, "return Carry(streams, mixing.pre, shared._replace(entries=carry.shared.entries)), cache",
          runs=CANDIDATES),
    _edit("an earlier choice handed on", LATE_READER, "input.chosen", block.V41Block, _ATTEND, _CARRY,
          "return Carry(streams, mixing.pre, shared._replace(chosen=carry.shared.chosen)), cache", runs=CANDIDATES),
    _edit("index keys of the layer before handed on", CHOOSER, "input.keys", block.V41Block, _ATTEND, _CARRY,
          "return Carry(streams, mixing.pre, shared._replace(keys=carry.shared.keys)), cache", runs=CANDIDATES),
    _edit("candidates handed on to other queries", CHOOSER, "input.candidates", block.V41Block, _ATTEND, _CARRY,
          "return Carry(streams, mixing.pre, shared._replace(candidates=shared.candidates[:, ::-1])), cache",
          runs=CANDIDATES),
)  # fmt: skip

_CALL, _COMPRESS = (attention.SharedAttention, "__call__"), (attention.SharedAttention, "_compress")
_READ = "entries, chosen = shared.entries, shared.chosen"
_ENTRY = "rotate(latents.values, latents.start, table), 2 *"
_CHOSEN, _CONTEXT, _NOMINATED = "attn.indexer.chosen", "attn.context", "attn.indexer.candidates"
_POOLED, _ENTRIES, _KEYS = "attn.compressor.pooled", "attn.compressor.entries", "attn.indexer.keys"
_NORMED = 'normed = rms_norm(taps("wk", linear(latents, self.wk[...])), self.k_norm[...], self.eps)'
_LINEAR = 'taps("wk", linear(latents, self.wk[...]))'

SHARED: tuple[Fault, ...] = (
    _edit("pairs shifted by a token", SOURCE, _POOLED, compressor.LatentCompressor, "_pool",
          "rows.astype(jnp.float32)", "jnp.roll(rows.astype(jnp.float32), 1, axis=1)"),
    _edit("softmax over channels", SOURCE, _POOLED, compressor.LatentCompressor, "_pool", "axis=2), axis=2)",
          "axis=3), axis=2)"),
    _edit("mean of the pair, no gate", SOURCE, _POOLED, compressor.LatentCompressor, "_pool",
          "jax.nn.softmax(gates, axis=2)", "0.5"),
    _edit("the compressor's eps 1e-6", SOURCE, "attn.compressor.norm", compressor.LatentCompressor, "__call__",
          "self.norm[...], self.eps", "self.norm[...], 1e-6"),
    _edit("keys and entries at the position of the next token", SOURCE, _KEYS, compressor.LatentCompressor, "__call__",
          "before[:, None] + block * ratio", "before[:, None] + block * ratio + 1"),
    _edit("keys and entries at the number of their block", SOURCE, _KEYS, compressor.LatentCompressor, "__call__",
          "before[:, None] + block * ratio", "before[:, None] + block"),
    _edit("index keys from the rotated latent", SOURCE, "attn.indexer.wk", *_COMPRESS,
          "self.indexer.keys(latents.values,", "self.indexer.keys(rotate(latents.values, latents.start, table),"),
    _edit("index keys rotated before their norm", CANDIDATES, "attn.indexer.k_norm", shared_indexer.SharedIndexer,
          "keys", _LINEAR, f"rotate({_LINEAR}, start, table)"),
    _edit("index keys not rotated", SOURCE, _KEYS, shared_indexer.SharedIndexer, "keys",
          'rotate(taps("k_norm", normed), start, table)', 'taps("k_norm", normed)'),
    _edit("index keys not normed", CANDIDATES, "attn.indexer.k_norm", shared_indexer.SharedIndexer, "keys", _NORMED,
          f"normed = {_LINEAR}"),
    _edit("entries not rotated", SOURCE, _ENTRIES, *_COMPRESS, _ENTRY, "latents.values, 2 *"),
    _edit("entries by the window-only layers' rotary table", CANDIDATES, _ENTRIES, *_COMPRESS, _ENTRY,
          "rotate(latents.values, latents.start, frequencies(self.config, compressed=False)), 2 *"),
    _edit("entries shared before their rotation", SOURCE, _CONTEXT, *_COMPRESS, "return Shared(entries, keys), None",
          "return Shared(latents.values, keys), None"),
    _edit("index keys shared before their rotation", SOURCE, "attn.indexer.scores", *_COMPRESS,
          "return Shared(entries, keys), None", "return Shared(entries, rotate(keys, -latents.start, table)), None"),
    _edit("the window-only layers' rotary table", READER, "attn.q_rope", *_CALL, "compressed=self.ratio > 0",
          "compressed=False"),
    _edit("queries normed per head, as in V4", READER, "attn.q_rope", *_CALL, "self._queries(q_low_rank, taps)",
          "self.numerics.query(self._queries(q_low_rank, taps), self.config.rms_norm_eps)"),
    _edit("queries see the block that is not complete", SOURCE, _CHOSEN, *_CALL, "complete_blocks(before + jnp",
          "complete_blocks(before + 1 + jnp"),
    _edit("queries see entries one token late", CANDIDATES, _NOMINATED, *_CALL, "complete_blocks(before + jnp",
          "complete_blocks(before - 1 + jnp"),
    _edit("a reader's choice of the query before", LATE_READER, _CONTEXT, *_CALL, _READ,
          "entries, chosen = shared.entries, jnp.roll(shared.chosen, 1, axis=1)"),
    _edit("a reader sees all entries", READER, _CONTEXT, *_CALL, _READ, "entries, chosen = shared.entries, None"),
    _edit("a reader sees none", LATE_READER, _CONTEXT, *_CALL, _READ,
          "entries, chosen = shared.entries, jnp.full_like(shared.chosen, -1)"),
    _edit("a reader's entries are those one later", READER, _CONTEXT, *_CALL, _READ,
          "entries, chosen = jnp.roll(shared.entries, -1, axis=1), shared.chosen"),
    _edit("an index source attends to other entries than it chose", CHOOSER, _CONTEXT, *_CALL, _READ,
          "entries, chosen = shared.entries, jnp.where(shared.chosen < 0, -1, shared.chosen // 2)"),
    _edit("index keys of the next entry", CHOOSER, "attn.indexer.scores", *_CALL, "q_low_rank, shared.keys,",
          "q_low_rank, jnp.roll(shared.keys, -1, axis=1),"),
    _edit("the newest block not forced", CANDIDATES, _NOMINATED, shared_indexer.SharedIndexer, "_nominate",
          "jnp.where(jnp.arange(best.shape[2]) == newest, jnp.inf, best)", "best"),
    _edit("the block of the next entry forced", CANDIDATES, _NOMINATED, shared_indexer.SharedIndexer, "_nominate",
          "(complete[..., None] - 1)", "complete[..., None]"),
    _edit("the first block forced", CANDIDATES, _NOMINATED, shared_indexer.SharedIndexer, "_nominate",
          "== newest", "== 0 * newest"),
    _edit("blocks by the mean of their scores", CANDIDATES, _NOMINATED, shared_indexer, "block_scores",
          "jnp.max(padded.reshape(*scores.shape[:2], -1, size), axis=3)",
          "jnp.mean(jnp.maximum(padded.reshape(*scores.shape[:2], -1, size), -99), axis=3)"),
    _edit("blocks of future entries nominated", CANDIDATES, _NOMINATED, shared_indexer.SharedIndexer, "_nominate",
          "jnp.where(visible, scores, -jnp.inf)", "scores"),
    _edit("candidates ignored", CHOOSER, _CHOSEN, shared_indexer.SharedIndexer, "_choose", "if inside is not None:",
          "if False:"),
    _edit("candidate blocks of another size", CHOOSER, _CHOSEN, shared_indexer.SharedIndexer, "_choose",
          "block_mask(inside, self.candidate_size, entries)", "block_mask(inside, self.candidate_size // 2, entries)"),
    _edit("the candidate source chooses among its candidates", CANDIDATES, _CHOSEN, shared_indexer.SharedIndexer,
          "_choose", "if inside is not None:",
          "inside = inside if nominated is None else nominated\n    if inside is not None:"),
    _edit("one entry too few chosen by a source", SOURCE, _CHOSEN, shared_indexer.SharedIndexer, "_choose",
          "choose(scores, visible, self.topk)", "choose(scores, visible, self.topk).at[..., 0].set(-1)"),
    _edit("relu of the indexer missing", SOURCE, "attn.indexer.scores", indexer.EntryScorer, "_scores",
          "jax.nn.relu(einsum_f32", "(einsum_f32"),
    _edit("head width scale of the indexer missing", CANDIDATES, "attn.indexer.scores", indexer.EntryScorer, "_scores",
          " * self.head_dim**-0.5\n", "\n"),
    _edit("head count scale of the indexer missing", CHOOSER, "attn.indexer.scores", indexer.EntryScorer, "_scores",
          " * self.heads**-0.5\n", "\n"),
)  # fmt: skip

_C = "attn.compressor"

LIKE_V4: tuple[Fault, ...] = (
    _both("wkv and wgate of the compressor swapped", SOURCE, f"{_C}.wkv", f"{_C}.wgate", f"{_C}.wkv"),
    _both("kv_norm and compressor norm swapped", SOURCE, "attn.kv_norm", f"{_C}.norm", "attn.kv_norm"),
    _one("k_norm left at ones", SOURCE, "attn.indexer.k_norm", "attn.indexer.k_norm", np.ones_like),
    _one("square wk transposed", CANDIDATES, "attn.indexer.wk", "attn.indexer.wk", _transposed),
    Fault(name="wk of two layers swapped", layer=SOURCE, tap="attn.indexer.wk", also=(CANDIDATES,),
          arrays=_swap("layers.2.attn.indexer.wk", "layers.4.attn.indexer.wk")),
    Fault(name="compressors of two layers swapped", layer=SOURCE, tap=f"{_C}.wkv", also=(CANDIDATES,),
          arrays=_swap("layers.2.attn.compressor.wkv", "layers.4.attn.compressor.wkv")),
    Fault(name="the image tokens' router bias", layer=READER, tap="ffn.gate.scores",
          arrays=_copy("layers.3.ffn.gate.bias", "layers.3.ffn.gate.bias_vl")),
    _one("router bias dropped", LATE_READER, "ffn.gate.bias", "ffn.gate.scores", np.zeros_like),
    _one("indexer's head weights in reverse", CHOOSER, "attn.indexer.weights_proj", "attn.indexer.weights_proj",
         lambda a: a[:, ::-1]),
    _one("heads of the indexer's wq_b rolled", SOURCE, "attn.indexer.wq_b", "attn.indexer.q_rope",
         lambda a: np.roll(a, 32, 1)),
    _both("gate and up of the experts swapped", WINDOW, "ffn.experts.w1", "ffn.experts.w3", "ffn.experts"),
    _both("gate and up of the shared expert swapped", READER, "ffn.shared_experts.w1", "ffn.shared_experts.w3",
          "ffn.shared_experts"),
    _both("attn_norm and ffn_norm swapped", NGRAMS, "attn_norm", "ffn_norm", "attn_norm"),
    _both("hyper-connections of both halves swapped", READER, "hc_attn_fn", "hc_ffn_fn", "hc_attn.pre"),
    _one("output groups of wo_a swapped", LATE_READER, "attn.wo_a", "attn.wo_a", lambda a: a[::-1]),
    _one("sinks dropped", WINDOW, "attn.attn_sink", _CONTEXT, lambda a: np.full_like(a, -1e9)),
    _one("embedding rows off by one", None, "embed", "embed", lambda a: np.roll(a, 1, 0)),
    _one("final norm left at ones", None, "norm", "norm", np.ones_like),
    Fault(name="output head tied to the embedding", layer=None, tap="logits",
          arrays=lambda arrays: arrays.update({"head": np.ascontiguousarray(arrays["embed"].T)})),
    _tensor("E8M0 exponents off by one", SOURCE, "attn.wq_a", r"layers\.2\.attn\.wq_a\.scale", lambda a: a + 1),
    _tensor("scales of 32-wide tiles shifted by a tile", READER, "attn.wq_a", r"layers\.3\.attn\.wq_a\.scale",
            lambda a: np.roll(a, 1, 1)),
    _tensor("scales of 32-wide tiles repeated as for wider ones", LATE_READER, "attn.wq_b",
            r"layers\.5\.attn\.wq_b\.scale", lambda a: np.repeat(a[::2], 2, 0)[: len(a)]),
    _tensor("nibbles reversed", CHOOSER, "ffn.experts", r"layers\.6\.ffn\.experts\.\d+\.w2\.weight",
            _nibbles_reversed),
    _of("YaRN missing", SOURCE, "attn.q_rope", {"yarn": None}),
    _of("YaRN factor wrong", READER, "attn.q_rope", {"yarn": dataclasses.replace(_YARN, factor=4.0)}),
    _of("rope base of the compressed layers for the window-only ones", WINDOW, "attn.q_rope",
        {"rope_theta": 160000.0}),
    _of("window one too long", NGRAMS, _CONTEXT, {"sliding_window": 7}),
    _of("rms_norm_eps 1e-6", WINDOW, "hc_attn.pre", {"rms_norm_eps": 1e-6}),
    _of("hc_eps missing", READER, "hc_attn.pre", {"hc_eps": 0.0}),
    _of("route scale missing", CANDIDATES, "ffn.gate.weights", {"routed_scaling_factor": 1.0}),
    _of("SwiGLU limit missing", CHOOSER, "ffn.experts", {"swiglu_limit": 1e9}),
    _edit("inverse rope missing", READER, "attn.context_unrotated", windowed.WindowedAttention, "_attended",
          "rotate(context, positions, table, inverse=True)", "context"),
    _edit("keys one position behind", SOURCE, "attn.kv_rope", windowed.WindowedAttention, "_keys",
          "rotate(kv, positions, table)", "rotate(kv, positions - 1, table)"),
    Fault(name="comb transposed", layer=LATE_READER, tap="hc_attn.streams",
          code={(block, "spread"): edited(hyper_connection, "spread", "bsjk,bsjd->bskd", "bskj,bsjd->bskd")}),
    Fault(name="post without the factor 2", layer=NGRAMS, tap="hc_attn.post",
          code={(decoder, "mix"): edited(hyper_connection, "mix", "post = 2 * jax", "post = jax")}),
    _edit("routing weights not normalised", READER, "ffn.gate.weights", router.Router, "__call__",
          "weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)", "weights = weights"),
    _edit("gelu instead of silu", SOURCE, "ffn.experts", experts, "swiglu", "jax.nn.silu", "jax.nn.gelu"),
    _edit("final norm missing", None, "norm", whole, "output", "rms_norm(x, norm, config.rms_norm_eps)", "x"),
)  # fmt: skip


def _named(fault: Fault) -> Fault:
    return dataclasses.replace(fault, model="v4.1")


V41: tuple[Fault, ...] = tuple(map(_named, (*ENGRAM, *CARRIED, *SHARED, *LIKE_V4)))
