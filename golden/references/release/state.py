"""The state of a block of DeepSeek's inference code after a prompt, as the taps of the state."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4_convert.golden.references.release.code import Code, complaint
from dsv4_convert.golden.references.release.probes import Expected
from dsv4_convert.spec.taps import is_state

Array = np.ndarray[Any, Any]

#: Name of a compressor here and in the code's block.
_COMPRESSORS = {"cache.compressor": "attn.compressor", "cache.indexer": "attn.indexer.compressor"}


def state_after(code: Code, block: Any, ring: Tensor, expected: Expected, tokens: int) -> dict[str, Array]:
    """The expected taps of the state after ``tokens`` tokens, by name within the layer.

    The window is a ring: token t is at place t modulo its size. A compressor has the rows of the incomplete block, in
    CSA behind those of the last complete one. Its gates have the position bias, if there is one.

    Raises:
        Dsv4Error: the code keeps something else.
    """
    found = {}
    for name, (_, shape) in expected.items():
        if not is_state(name):
            continue
        path, _, part = name.rpartition(".")
        try:
            if 0 in shape:  # the code may have no place for what is never there
                value = ring.new_empty(shape)
            elif path == "cache":
                value = ring[: shape[0], np.arange(tokens - shape[1], tokens) % ring.shape[1]]
            else:
                value = _of_compressor(block.get_submodule(_COMPRESSORS[path]), part, shape)
        except (AttributeError, IndexError) as error:
            raise complaint(code, f"{name}: {error}") from error
        if value.shape != shape:
            raise complaint(code, f"{name}: expected {list(shape)} in its cache, found {list(value.shape)}")
        found[name] = np.array(value.to(torch.float64 if ring.dtype == torch.float64 else torch.float32).numpy())
    return found


def _of_compressor(compressor: Any, part: str, shape: tuple[int, ...]) -> Tensor:
    batch, rows, width = shape
    of_gates = part.endswith("gates")
    held: Tensor = compressor.score_state if of_gates else compressor.kv_state
    if part.startswith("overlap"):
        return held[:batch, :rows, :width]
    first = compressor.compress_ratio if getattr(compressor, "overlap", False) else 0
    value = held[:batch, first : first + rows]
    bias = getattr(compressor, "ape", None)
    return value if bias is None or not of_gates else value.double() - bias[:rows].double()
