"""What the prompt of a golden reaches: an operation that never runs, or has nothing to decide, is not checked by it."""

from __future__ import annotations

import dataclasses

import numpy as np

from dsv4_convert.config import Attention, Config
from dsv4_convert.golden.archive import Golden


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReach:
    """One layer: what the golden leaves unchecked, in words, and how many routed experts its tokens reach."""

    layer: int
    missed: tuple[str, ...]
    experts: int
    of: int

    @property
    def complete(self) -> bool:
        """Every operation and every expert is reached."""
        return not self.missed and self.experts == self.of


def reach(golden: Golden, layer: int) -> LayerReach:
    """What a golden reaches in one recorded layer."""
    config, tokens = golden.config, golden.tokens.shape[1]
    chosen = golden.read(f"layers.{layer}.ffn.gate.experts")
    return LayerReach(
        layer=layer,
        missed=tuple(_missed(config, layer, tokens)),
        experts=len(np.unique(chosen)),
        of=config.n_routed_experts,
    )


def _missed(config: Config, layer: int, tokens: int) -> list[str]:
    """What ``tokens`` tokens do not reach in a layer."""
    kind = config.attention[layer]
    missed = []
    if tokens <= config.sliding_window:
        missed.append(f"the window of {config.sliding_window} tokens never drops one")
    if kind is Attention.SLIDING:
        return missed
    ratio = config.ratio(kind)
    entries = tokens // ratio
    if not entries:
        return [*missed, f"no block of {ratio} tokens is complete, so the compressor makes no entry"]
    if kind is Attention.HCA:
        return missed
    if entries < 2:
        missed.append(f"a single block of {ratio} tokens is complete, so none overlaps with the one before")
    if entries <= config.index_topk:
        missed.append(f"the indexer never has to choose: {entries} entries, of which it may keep {config.index_topk}")
    return missed
