"""How many floating-point operations a forward pass needs, from the architecture alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from dsv4_convert.spec.config import AttentionKind, Config
from dsv4_convert.spec.names import Kind, Rule, Transform, parameters


def operations(config: Config, *, tokens: int, decode: bool) -> int:
    """Multiplications and additions in the matrix products that one prompt needs; the rest is small beside them.

    Whole prompts of ``tokens``, or with ``decode`` the last of so many. Of the routed experts those that a token is
    sent to; of the keys and entries those that it sees.
    """
    fresh = 1 if decode else tokens
    total = sum(
        2 * fresh * math.prod(rule.target_shape(config, layer)) * _share(config, rule)
        for _, rule, layer in parameters(config)
        if _multiplies(rule)
    )
    before = np.arange(tokens - fresh + 1, tokens + 1)
    return int(total) + sum(
        count * _attention(config, kind, before) for kind, count in Counter(config.attention).items()
    )


def _multiplies(rule: Rule) -> bool:
    """Whether a parameter is the matrix of a product: the published ones are turned round, but for mHC's."""
    return rule.transform in (Transform.TRANSPOSE, Transform.GROUPED) or rule.path.endswith("_fn")


def _share(config: Config, rule: Rule) -> float:
    return config.num_experts_per_tok / config.n_routed_experts if rule.kind is Kind.EXPERT else 1


def _attention(config: Config, kind: AttentionKind, tokens: np.ndarray[Any, Any]) -> int:
    """Scores and sums over values in one layer, for queries that are the last of so many ``tokens`` each."""
    keys = np.minimum(tokens, config.sliding_window)
    scored = np.zeros_like(tokens)
    if kind is not AttentionKind.SLIDING:
        entries = tokens // config.ratio(kind)
        keys = keys + (np.minimum(entries, config.index_topk) if kind is AttentionKind.CSA else entries)
        scored = entries if kind is AttentionKind.CSA else scored
    attended = 4 * config.num_attention_heads * config.head_dim * keys
    return int(np.sum(attended + 2 * config.index_n_heads * config.index_head_dim * scored))
