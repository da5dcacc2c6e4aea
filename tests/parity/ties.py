"""Ties, planted: a token of a layer's recorded activations that chooses between its two closest scores otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def swapped_expert(layer: dict[str, Array], closest: bool) -> int:
    """Make one token take the best expert that it left out for the worst that it took; which token."""
    scores, experts = layer["ffn.gate.scores"], layer["ffn.gate.experts"]
    order = np.argsort(-scores[0], axis=-1)
    kept = experts.shape[-1]
    rows = np.arange(scores.shape[1])
    margins = scores[0][rows, order[:, kept - 1]] - scores[0][rows, order[:, kept]]
    token = int(np.argmin(margins) if closest else np.argmax(margins))
    experts[0, token] = np.sort([*order[token, : kept - 1], order[token, kept]])
    for name in ("ffn.gate.weights", "ffn.experts", "ffn", "hc_ffn.streams"):
        layer[name][0, token] += 1
    return token


def swapped_entries(layer: dict[str, Array]) -> int:
    """The same of the compressed entries that the indexer chooses; only of the choice, not of what follows from it."""
    scores, chosen = layer["attn.indexer.scores"], layer["attn.indexer.chosen"]
    best: tuple[float, int, int, int] | None = None
    for token in range(scores.shape[1] - scores.shape[1] // 4, scores.shape[1]):  # they all see more than they choose
        row = scores[0, token]
        visible = np.flatnonzero(np.isfinite(row))[: (token + 1) // 4]
        kept = chosen[0, token]
        left_out = np.setdiff1d(visible, kept)
        worst, next_best = kept[np.argmin(row[kept])], left_out[np.argmax(row[left_out])]
        margin = float(row[worst] - row[next_best])
        if best is None or margin < best[0]:
            best = (margin, token, int(worst), int(next_best))
    assert best is not None
    _, token, worst, next_best = best
    chosen[0, token] = np.sort(np.where(chosen[0, token] == worst, next_best, chosen[0, token]))
    return token
