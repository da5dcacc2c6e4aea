"""How many floating-point operations a forward pass needs, from the architecture alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import Kind, Rule, Section, Transform, parameters


def operations(config: Config, *, tokens: int, decode: bool) -> int:
    """Multiplications and additions in the matrix products of one prompt; other operations are few beside them.

    The prompt has ``tokens`` tokens; with ``decode`` only the last one is computed. A token counts only the experts
    that it is routed to, and the keys and entries that it sees.
    """
    fresh = 1 if decode else tokens
    total = sum(
        2 * fresh * math.prod(rule.target_shape(config, layer)) * _share(config, rule)
        for _, rule, layer in parameters(config)
        if _multiplies(rule)
    )
    before = np.arange(tokens - fresh + 1, tokens + 1)
    return int(total) + sum(_attention(config, layer, before) for layer in range(config.num_hidden_layers))


def _multiplies(rule: Rule) -> bool:
    """Whether a parameter is a matrix of a product: mHC's keep the published orientation, the others are transposed."""
    if rule.section is Section.VISION:  # which is not computed
        return False
    return rule.transform in (Transform.TRANSPOSE, Transform.GROUPED) or rule.path.endswith("_fn")


def _share(config: Config, rule: Rule) -> float:
    return config.num_experts_per_tok / config.n_routed_experts if rule.kind is Kind.EXPERT else 1


def _attention(config: Config, layer: int, tokens: np.ndarray[Any, Any]) -> int:
    """Scores and sums over values in one layer, for queries whose contexts have these numbers of ``tokens``."""
    ratio = config.ratio_of(layer)
    entries = tokens // ratio if ratio else np.zeros_like(tokens)
    keys = np.minimum(tokens, config.sliding_window) + (
        np.minimum(entries, config.index_topk) if config.chooses(layer) else entries
    )
    scored = entries if config.indexes(layer) else np.zeros_like(tokens)
    attended = 4 * config.num_attention_heads * config.head_dim * keys
    return int(np.sum(attended + 2 * config.index_n_heads * config.index_head_dim * scored))
