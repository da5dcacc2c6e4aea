"""What transformers' cache holds of one layer, as the taps of :data:`dsv4_convert.taps.STATE`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from dsv4_convert.errors import Dsv4Error
from dsv4_convert.golden.references.precision import as_array
from dsv4_convert.golden.references.probes import Expected
from dsv4_convert.taps import is_state

Array = np.ndarray[Any, Any]

#: Name of a compressor here and there.
_COMPRESSORS = {"cache.compressor": "compressor", "cache.indexer": "indexer"}
#: Part of its state here -> attribute of the cache, a dictionary by name of the compressor.
_PARTS = {
    "values": "buffer_kv",
    "gates": "buffer_gate",
    "overlap_values": "overlap_kv",
    "overlap_gates": "overlap_gate",
}


def state_after(cache: DynamicCache, layer: int, expected: Expected) -> dict[str, Array]:
    """The expected taps of the state, by name within the layer.

    Raises:
        Dsv4Error: the cache is built in another way than is known here.
    """
    held = cache.layers[layer]
    found = {}
    for name, (_, shape) in expected.items():
        if not is_state(name):
            continue
        path, _, part = name.rpartition(".")
        value: Tensor | None = held.keys[:, 0] if path == "cache" else getattr(held, _PARTS[part])[_COMPRESSORS[path]]
        if value is None and 0 in shape:  # nothing was kept yet, as no block is complete
            value = torch.empty(shape)
        if value is None or value.shape != shape:
            there = None if value is None else list(value.shape)
            raise Dsv4Error(f"layers.{layer}.{name}: expected {list(shape)} in transformers' cache, found {there}")
        found[name] = as_array(value.clone(memory_format=torch.contiguous_format))
    return found
