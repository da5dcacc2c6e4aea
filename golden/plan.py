"""The cost of a recording, known before it starts: bytes to read and to write, and memory."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from pathlib import Path

from dsv4_convert.checkpoint import Checkpoint
from dsv4_convert.errors import ResourceError
from dsv4_convert.files.limits import free_bytes
from dsv4_convert.golden.layout import StoredShape, expected_aliases
from dsv4_convert.golden.manifest import RecordingRequest
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.coverage import Leaf, Resolution

_FLOAT32_BYTES = 4
#: The interpreter with torch and transformers imported.
_BASE_BYTES = 520 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordingPlan:
    """Sizes of one recording, in bytes.

    Attributes:
        bytes_read: all tensors of the layers that run. Experts that no token reaches are hashed but not decoded.
        bytes_written: all arrays of the golden.
        bytes_whole: the same if every tap was kept whole; it differs for a compact golden.
        memory: about the peak memory, without the mapped pages of the source.
    """

    bytes_read: int
    bytes_written: int
    bytes_whole: int
    memory: int


def plan(
    checkpoint: Checkpoint, resolution: Resolution, request: RecordingRequest, *, passes: int = 1
) -> RecordingPlan:
    """Plan a recording that reads the weights ``passes`` times; ``resolution`` covers every layer that runs."""
    batch, tokens = request.token_array.shape
    names = {name for leaf in resolution.leaves for source in leaf.sources for name in (source.weight, source.scale)}
    taps: dict[int | None, int] = defaultdict(int)
    for array in _stored(dataclasses.replace(request, compact=None)):
        taps[array.layer] += array.nbytes
    weights: dict[int | None, int] = defaultdict(int)
    for leaf in resolution.leaves:  # of a stack of experts, the source's shape is one expert's
        weights[leaf.layer] += _rows_held(leaf, request) * math.prod(leaf.source_shape[1:]) * _FLOAT32_BYTES
    ran = [layer for layer in weights if layer is not None]
    # In float64 weights and attention take twice the memory, and so does what is compared with the golden's taps.
    wide = 2 if "float32" in request.noise else 1
    attention = {layer: batch * _attention(request.config, layer, tokens) for layer in ran}
    working = max(wide * (weights[layer] + attention[layer] + taps[layer]) for layer in ran)
    return RecordingPlan(
        bytes_read=passes * sum(checkpoint.tensors[name].nbytes for name in names if name is not None),
        bytes_written=sum(array.nbytes for array in _stored(request)),
        bytes_whole=sum(taps.values()),
        memory=_BASE_BYTES + max(working, 2 * wide * taps[None]),
    )


def _rows_held(leaf: Leaf, request: RecordingRequest) -> int:
    """The rows of a parameter that are in memory at a time; of an n-gram table those that the prompt looks up."""
    rows = leaf.source_shape[0]
    if leaf.layer is None or not leaf.rule.is_table:
        return rows
    return min(rows, request.token_array.size * request.config.tap_sizes(0)["J"])


def _stored(request: RecordingRequest) -> list[StoredShape]:
    """Every array that is written."""
    arrays = request.arrays()
    aliases = expected_aliases(request.config, request.layers, arrays)
    return [array for name, array in arrays.items() if name not in aliases]


def check_space(out: Path, needed: int) -> None:
    """Raise :class:`ResourceError` unless the file system of ``out`` has ``needed`` bytes free."""
    free = free_bytes(out)
    if free < needed:
        raise ResourceError(
            f"{out}: the golden takes {needed:,} bytes, {free:,} are free; make room, choose another folder, or record "
            "fewer tokens or layers"
        )


def _attention(config: Config, layer: int, tokens: int) -> int:
    """Bytes that the reference's attention holds for one prompt: scores, queries, and the keys once per head.

    The counts are fitted: at V4-Flash's width the plan says 1.29 and 1.84 GiB for 64 and 320 tokens, measured were 1.26
    and 1.82 GiB.
    """
    ratio = config.ratio_of(layer)
    entries = tokens // ratio if ratio else 0
    keys = tokens + entries
    scores = 3 * config.num_attention_heads * tokens * keys
    repeated = 2 * config.num_attention_heads * keys * config.head_dim
    queries = 4 * config.num_attention_heads * tokens * config.head_dim
    indexed = 2 * config.index_n_heads * tokens * entries
    return _FLOAT32_BYTES * max(scores + repeated + queries, indexed)
