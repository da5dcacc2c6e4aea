"""Faults of single parameters: a converter that put the right tensors into the wrong place, order or dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from .fault import CSA, HCA, LEARNED_CSA, SLIDING, Array, Arrays, Fault


def _change(path: str, change: Callable[[Array], Array]) -> Callable[[Arrays], object]:
    def plant(arrays: Arrays) -> None:
        arrays[path] = np.ascontiguousarray(change(arrays[path])).astype(arrays[path].dtype)

    return plant


def _swap(one: str, other: str) -> Callable[[Arrays], object]:
    def plant(arrays: Arrays) -> None:
        arrays[one], arrays[other] = arrays[other], arrays[one]

    return plant


def _copy(target: str, source: str) -> Callable[[Arrays], object]:
    return lambda arrays: arrays.update({target: arrays[source]})


def _swap_layers(one: int, other: int) -> Callable[[Arrays], object]:
    def plant(arrays: Arrays) -> None:
        for path in [path for path in arrays if path.startswith(f"layers.{one}.")]:
            twin = path.replace(f"layers.{one}.", f"layers.{other}.")
            if twin in arrays:
                arrays[path], arrays[twin] = arrays[twin], arrays[path]

    return plant


def _bfloat16(array: Array) -> Array:
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def _halves_swapped(array: Array) -> Array:
    return np.roll(array, array.shape[-1] // 2, axis=-1)


def _two_swapped(array: Array) -> Array:
    return array[[1, 0, *range(2, len(array))]]


def _columns(order: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Reorder the heads in the columns ``[in, H * C]`` of 4 heads."""

    def change(array: Array) -> Array:
        heads = array.reshape(array.shape[0], 4, -1)
        return order(heads).reshape(array.shape)

    return change


def _one(
    name: str, layer: int | None, parameter: str, tap: str, change: Callable[[Array], Array], **more: Any
) -> Fault:
    path = parameter if layer is None else f"layers.{layer}.{parameter}"
    return Fault(name=name, layer=layer, tap=tap, arrays=_change(path, change), **more)


def _both(name: str, layer: int, one: str, other: str, tap: str) -> Fault:
    return Fault(name=name, layer=layer, tap=tap, arrays=_swap(f"layers.{layer}.{one}", f"layers.{layer}.{other}"))


_C, _I = "attn.compressor", "attn.indexer.compressor"
_EXPERTS = "ffn.experts"


def _transposed(array: Array) -> Array:
    return np.swapaxes(array, -1, -2)


def _rotate_experts(arrays: Arrays) -> None:
    one, two, three = (f"layers.2.ffn.experts.w{number}" for number in (1, 2, 3))
    arrays[one], arrays[two], arrays[three] = arrays[two], arrays[three], arrays[one]


def _expert_of(array: Array, expert: int, value: Any) -> Array:
    changed = array.copy()
    changed[expert] = value
    return changed


WEIGHTS: tuple[Fault, ...] = (
    _both("gate and up of the experts swapped", SLIDING, "ffn.experts.w1", "ffn.experts.w3", _EXPERTS),
    _both("gate and up of the shared expert swapped", HCA, "ffn.shared_experts.w1", "ffn.shared_experts.w3",
          "ffn.shared_experts"),
    Fault(name="w1, w2, w3 of the experts permuted", layer=HCA, tap=_EXPERTS, arrays=_rotate_experts),
    _both("w2 and w3 of the shared expert swapped", CSA, "ffn.shared_experts.w2", "ffn.shared_experts.w3",
          "ffn.shared_experts"),
    _one("square wq_a transposed", CSA, "attn.wq_a", "attn.wq_a", _transposed),
    _one("square wq_b transposed", SLIDING, "attn.wq_b", "attn.wq_b", _transposed),
    _one("square w2 of the experts transposed", LEARNED_CSA, "ffn.experts.w2", _EXPERTS, _transposed),
    _one("w1 of one expert transposed", HCA, "ffn.experts.w1", _EXPERTS,
         lambda a: _expert_of(a, 3, a[3].T)),
    _one("two experts swapped in w2", HCA, "ffn.experts.w2", _EXPERTS, _two_swapped),
    _one("two experts swapped in w1", SLIDING, "ffn.experts.w1", _EXPERTS, _two_swapped),
    _one("one expert left at zero", LEARNED_CSA, "ffn.experts.w3", _EXPERTS, lambda a: _expert_of(a, 5, 0)),
    _one("one expert of another layer", CSA, "ffn.experts.w2", _EXPERTS, lambda a: _expert_of(a, 2, a[4])),
    Fault(name="two layers swapped", layer=CSA, tap="hc_attn.pre", arrays=_swap_layers(CSA, LEARNED_CSA),
          also=(LEARNED_CSA,)),
    Fault(name="a layer's weights read for the layer before", layer=SLIDING, tap="attn_norm",
          arrays=_copy("layers.0.attn_norm", "layers.1.attn_norm")),
    _one("wkv columns of the compressor reversed (Ca and Cb in reverse)", CSA, f"{_C}.wkv", f"{_C}.wkv",
         lambda a: a[:, ::-1]),
    _one("Ca and Cb halves of wkv swapped", CSA, f"{_C}.wkv", f"{_C}.wkv", _halves_swapped),
    _one("Za and Zb halves of wgate swapped", LEARNED_CSA, f"{_C}.wgate", f"{_C}.wgate", _halves_swapped),
    _one("halves of the ape swapped", CSA, f"{_C}.ape", f"{_C}.pooled", _halves_swapped),
    _both("wkv and wgate of the compressor swapped", HCA, f"{_C}.wkv", f"{_C}.wgate", f"{_C}.wkv"),
    _both("wkv and wgate of the indexer's compressor swapped", CSA, f"{_I}.wkv", f"{_I}.wgate", f"{_I}.wkv"),
    _one("ape dropped", HCA, f"{_C}.ape", f"{_C}.pooled", np.zeros_like),
    _one("ape rolled by one token", LEARNED_CSA, f"{_C}.ape", f"{_C}.pooled", lambda a: np.roll(a, 1, 0)),
    _one("ape of the indexer dropped", CSA, f"{_I}.ape", f"{_I}.pooled", np.zeros_like),
    _both("compressor and indexer's compressor swapped: ape", CSA, f"{_C}.ape", f"{_I}.ape", f"{_C}.pooled"),
    _both("compressor and indexer's compressor swapped: wkv", CSA, f"{_C}.wkv", f"{_I}.wkv", f"{_C}.wkv"),
    _both("compressor and indexer's compressor swapped: norm", LEARNED_CSA, f"{_C}.norm", f"{_I}.norm", f"{_C}.norm"),
    _both("kv_norm and compressor norm swapped", HCA, "attn.kv_norm", f"{_C}.norm", "attn.kv_norm"),
    _one("kv_norm left at ones", SLIDING, "attn.kv_norm", "attn.kv_norm", np.ones_like),
    _both("attn_norm and ffn_norm swapped", CSA, "attn_norm", "ffn_norm", "attn_norm"),
    _one("q_norm in reverse", SLIDING, "attn.q_norm", "attn.q_norm", lambda a: a[::-1]),
    _one("ffn_norm with an offset of 1", HCA, "ffn_norm", "ffn_norm", lambda a: a + 1),
    _one("sinks dropped", SLIDING, "attn.attn_sink", "attn.context", lambda a: np.full_like(a, -1e9)),
    _one("sinks left at zero", HCA, "attn.attn_sink", "attn.context", np.zeros_like),
    _one("sinks of other heads", CSA, "attn.attn_sink", "attn.context", lambda a: np.roll(a, 1)),
    _one("sinks rounded to bfloat16", LEARNED_CSA, "attn.attn_sink", "attn.context", _bfloat16,
         legal="a sink stands among scores, whose queries and keys are rounded likewise"),
    _one("ape rounded to bfloat16", HCA, f"{_C}.ape", f"{_C}.pooled", _bfloat16,
         legal="it is added to gates, which are rounded likewise"),
    _one("router bias rounded to bfloat16", HCA, "ffn.gate.bias", "ffn.gate.scores", _bfloat16,
         legal="it is added to scores of inputs that are rounded likewise"),
    _one("hc_attn_fn rounded to bfloat16", SLIDING, "hc_attn_fn", "hc_attn.pre", _bfloat16,
         legal="the streams, the other factor of each product, are rounded likewise"),
    _one("hc_ffn_base rounded to bfloat16", CSA, "hc_ffn_base", "hc_ffn.pre", _bfloat16,
         or_taps=("hc_ffn.post", "hc_ffn.comb"), model="wide"),
    _one("hc_ffn_scale rounded to bfloat16", HCA, "hc_ffn_scale", "hc_ffn.pre", _bfloat16,
         or_taps=("hc_ffn.post", "hc_ffn.comb"), model="wide"),
    _one("router bias dropped", LEARNED_CSA, "ffn.gate.bias", "ffn.gate.scores", np.zeros_like),
    _one("router bias with the wrong sign", HCA, "ffn.gate.bias", "ffn.gate.scores", np.negative),
    _one("router experts rolled by one", CSA, "ffn.gate.weight", "ffn.gate.logits", lambda a: np.roll(a, 1, 1)),
    _one("hash table off by one token", SLIDING, "ffn.gate.tid2eid", "ffn.gate.experts", lambda a: np.roll(a, 1, 0)),
    _one("hash table off by one expert", CSA, "ffn.gate.tid2eid", "ffn.gate.experts", lambda a: (a + 1) % 6),
    Fault(name="hash table reused across layers", layer=CSA, tap="ffn.gate.experts",
          arrays=_copy("layers.1.ffn.gate.tid2eid", "layers.0.ffn.gate.tid2eid")),
    Fault(name="hash table rounded through bfloat16", layer=0, tap="ffn.gate.experts", model="many",
          arrays=_change("layers.0.ffn.gate.tid2eid", _bfloat16)),
    _one("output groups of wo_a swapped", CSA, "attn.wo_a", "attn.wo_a", lambda a: a[::-1]),
    _one("wo_a as one matrix, groups interleaved", HCA, "attn.wo_a", "attn.wo_a",
         lambda a: a.transpose(1, 0, 2).reshape(a.shape)),
    _one("rows of wo_b rolled by a group", SLIDING, "attn.wo_b", "attn.wo_b", lambda a: np.roll(a, 16, 0)),
    _one("heads of wq_b in reverse", CSA, "attn.wq_b", "attn.wq_b", _columns(lambda heads: heads[:, ::-1])),
    _one("heads and channels of wq_b exchanged", HCA, "attn.wq_b", "attn.wq_b",
         _columns(lambda heads: heads.swapaxes(1, 2))),
    _one("rope channels of wkv reordered to halves", SLIDING, "attn.wkv", "attn.wkv",
         lambda a: np.concatenate([a[:, :-8], a[:, -8::2], a[:, -7::2]], axis=1)),
    _one("heads of the indexer's wq_b rolled", CSA, "attn.indexer.wq_b", "attn.indexer.q_rope",
         lambda a: np.roll(a, 16, 1)),
    _one("indexer's head weights in reverse", LEARNED_CSA, "attn.indexer.weights_proj", "attn.indexer.weights_proj",
         lambda a: a[:, ::-1]),
    _one("scales of post and comb swapped", LEARNED_CSA, "hc_attn_scale", "hc_attn.post", lambda a: a[[0, 2, 1]]),
    _both("hyper-connections of both halves swapped", CSA, "hc_attn_fn", "hc_ffn_fn", "hc_attn.pre"),
    _one("comb part of hc_attn_fn transposed", LEARNED_CSA, "hc_attn_fn", "hc_attn.comb",
         lambda a: np.concatenate([a[:8], a[8:].reshape(4, 4, -1).swapaxes(0, 1).reshape(16, -1)])),
    _one("streams of hc_ffn_fn in reverse", SLIDING, "hc_ffn_fn", "hc_ffn.pre",
         lambda a: a.reshape(24, 4, -1)[:, ::-1].reshape(a.shape)),
    _one("embedding rows off by one", None, "embed", "embed", lambda a: np.roll(a, 1, 0)),
    _one("head scale missing", None, "hc_head_scale", "hc_head.pre", np.ones_like),
    _one("head base missing", None, "hc_head_base", "hc_head.pre", np.zeros_like),
    _one("final norm left at ones", None, "norm", "norm", np.ones_like),
    Fault(name="output head tied to the embedding", layer=None, tap="logits",
          arrays=lambda arrays: arrays.update({"head": np.ascontiguousarray(arrays["embed"].T)})),
)  # fmt: skip
