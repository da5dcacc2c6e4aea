"""Faults of reading quantised tensors: nibbles, scales, tiles."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .fault import CSA, HCA, LEARNED_CSA, SLIDING, Array, Fault


def _where(pattern: str, change: Callable[[Array], Array]) -> Callable[[str, Array], Array]:
    compiled = re.compile(pattern)

    def tensor(name: str, array: Array) -> Array:
        if compiled.fullmatch(name) is None:
            return array
        return np.ascontiguousarray(change(array.view(np.uint8))).view(array.dtype)

    return tensor


def _nibbles_reversed(codes: Array) -> Array:
    return (codes << 4) | (codes >> 4)


def _twos_complement(codes: Array) -> Array:
    """Codes read as signed integers whose sign is not a bit of its own: -x becomes the code 16 - x."""

    def nibble(code: Array) -> Array:
        return np.where(code & 8, 16 - (code & 7), code) & 15

    return (nibble(codes & 15) | (nibble(codes >> 4) << 4)).astype(np.uint8)


DECODING: tuple[Fault, ...] = (
    Fault(name="one expert missing its scale", layer=HCA, tap="ffn.experts",
          tensor=_where(r"layers\.2\.ffn\.experts\.3\.w1\.scale", lambda a: np.full_like(a, 127))),
    Fault(name="all experts' w2 missing their scales", layer=SLIDING, tap="ffn.experts",
          tensor=_where(r"layers\.0\.ffn\.experts\.\d+\.w2\.scale", lambda a: np.full_like(a, 127))),
    Fault(name="FP4 scales shifted by a block", layer=LEARNED_CSA, tap="ffn.experts",
          tensor=_where(r"layers\.3\.ffn\.experts\.\d+\.w3\.scale", lambda a: np.roll(a, 1, 1))),
    Fault(name="FP4 scales shifted by a row", layer=CSA, tap="ffn.experts",
          tensor=_where(r"layers\.1\.ffn\.experts\.\d+\.w1\.scale", lambda a: np.roll(a, 1, 0))),
    Fault(name="nibbles reversed", layer=HCA, tap="ffn.experts",
          tensor=_where(r"layers\.2\.ffn\.experts\.\d+\.w2\.weight", _nibbles_reversed)),
    Fault(name="nibbles of one expert reversed", layer=CSA, tap="ffn.experts",
          tensor=_where(r"layers\.1\.ffn\.experts\.4\.w3\.weight", _nibbles_reversed)),
    Fault(name="FP4 codes read as two's complement", layer=SLIDING, tap="ffn.experts",
          tensor=_where(r"layers\.0\.ffn\.experts\.\d+\.w1\.weight", _twos_complement)),
    Fault(name="E8M0 exponents off by one", layer=HCA, tap="attn.wq_a",
          tensor=_where(r"layers\.2\.attn\.wq_a\.scale", lambda a: a + 1)),
    Fault(name="E8M0 scales as their reciprocals", layer=CSA, tap="attn.wkv",
          tensor=_where(r"layers\.1\.attn\.wkv\.scale", lambda a: 254 - a)),
    Fault(name="FP8 codes read without their scale", layer=LEARNED_CSA, tap="attn.indexer.q_rope",
          tensor=_where(r"layers\.3\.attn\.indexer\.wq_b\.scale", lambda a: np.full_like(a, 127))),
    Fault(name="FP8 sign bit lost", layer=SLIDING, tap="attn.wo_b",
          tensor=_where(r"layers\.0\.attn\.wo_b\.weight", lambda a: a & 127)),
    Fault(name="FP8 e4m3 read with the bias of e4m3fnuz", layer=HCA, tap="ffn.shared_experts",
          tensor=_where(r"layers\.2\.ffn\.shared_experts\.w2\.scale", lambda a: a - 1)),
)  # fmt: skip
