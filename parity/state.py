"""The state of one layer in our cache, as taps (``config.state``)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from dsv4_convert.model.attention import Attention
from dsv4_convert.model.v41.attention import SharedAttention

Array = np.ndarray[Any, Any]


def state_after(attention: Attention | SharedAttention, cache: Any, tokens: int) -> dict[str, Array]:
    """The taps of the state after ``tokens`` tokens of every prompt, by name within the layer."""
    found = {"cache.window": cache.window[:, max(cache.window.shape[1] - tokens, 0) :]}
    for name, compressor, own in attention.compressors(cache):
        found |= _compressed(f"cache.{name}", compressor, own, tokens)
    return {name: np.asarray(value, np.float32) for name, value in found.items()}


def _compressed(path: str, compressor: Any, cache: Any, tokens: int) -> dict[str, Any]:
    """Rows of the incomplete block, and the overlap that the block before it leaves."""
    end, ratio = cache.values.shape[1], compressor.ratio
    pending = end - tokens % ratio
    found = {f"{path}.values": cache.values[:, pending:], f"{path}.gates": cache.gates[:, pending:]}
    if compressor.overlap:
        width = cache.entries.shape[2]
        rows = slice(pending - ratio if tokens >= ratio else pending, pending)
        found[f"{path}.overlap_values"] = cache.values[:, rows, :width]
        found[f"{path}.overlap_gates"] = (
            cache.gates[:, rows].astype(jnp.float32) + np.asarray(compressor.ape[...])[: rows.stop - rows.start]
        )[..., :width]
    return found
