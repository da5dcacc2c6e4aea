"""The kinds of layers of DeepSeek-V4."""

from __future__ import annotations

from enum import StrEnum


class AttentionKind(StrEnum):
    """The entries that a layer attends to besides its sliding window (paper section 2.3)."""

    SLIDING = "sliding_attention"
    CSA = "compressed_sparse_attention"
    HCA = "heavily_compressed_attention"
