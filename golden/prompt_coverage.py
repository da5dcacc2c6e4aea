"""Coverage of a golden's prompt: it cannot check an operation that never runs or has nothing to decide."""

from __future__ import annotations

import dataclasses

import numpy as np

from dsv4_convert.golden.archive import Golden
from dsv4_convert.golden.layout import known_tokens
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.taps import TapKey, taps_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCoverage:
    """One layer or stage: the unchecked operations, in words, and how many routed experts the tokens reach."""

    layer: int
    missed: tuple[str, ...]
    experts: int
    of: int

    @property
    def complete(self) -> bool:
        """Every operation and every expert is reached."""
        return not self.missed and self.experts == self.of


def prompt_coverage(golden: Golden, layer: int) -> LayerCoverage:
    """The coverage of one recorded layer or stage."""
    config, tokens = golden.config, golden.tokens.shape[1]
    chosen = golden.read(TapKey.of(config, layer, "ffn.gate.experts"))
    return LayerCoverage(
        layer=layer,
        missed=tuple(_missed(config, layer, tokens)),
        experts=len(np.unique(chosen)),
        of=config.experts_of(layer),
    )


def _missed(config: Config, layer: int, tokens: int) -> list[str]:
    """The operations of a layer that ``tokens`` tokens leave unchecked."""
    missed = []
    if (known_tokens(tokens) if config.drafts_blocks(layer) else tokens) <= config.sliding_window:
        missed.append(f"the window of {config.sliding_window} tokens never drops one")
    ratio = config.ratio_of(layer)
    if not ratio:
        return missed
    entries = tokens // ratio
    if not entries:
        return [*missed, f"no block of {ratio} tokens is complete, so the compressor makes no entry"]
    if not config.indexes(layer):
        return missed
    if entries < 2 and config.compressor_width(layer) > config.head_dim:
        missed.append(f"a single block of {ratio} tokens is complete, so none overlaps with the one before")
    if entries <= config.index_topk:
        missed.append(f"the indexer never has to choose: {entries} entries, of which it may keep {config.index_topk}")
    names = {tap.name for tap in taps_of(config, layer)}
    blocks, kept = -(-entries // max(1, config.entries_per_candidate)), config.tap_sizes(entries).get("c", 0)
    if blocks <= kept and names & {"attn.indexer.candidates", "input.candidates"}:
        missed.append(f"no candidate block is ever left out: {blocks} blocks, of which it may keep {kept}")
    return missed
