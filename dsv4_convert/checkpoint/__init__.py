"""Hugging Face checkpoints: opening, reading and writing them. Knows nothing of models or of JAX.

Downloading is in :mod:`dsv4_convert.checkpoint.hub`, which is imported where it is needed: it loads an HTTP client.
"""

from __future__ import annotations

from dsv4_convert.checkpoint.folder import Checkpoint, open_checkpoint
from dsv4_convert.checkpoint.header import TensorInfo, read_header
from dsv4_convert.checkpoint.writer import TensorEntry, write_index, write_safetensors

__all__ = [
    "Checkpoint",
    "TensorEntry",
    "TensorInfo",
    "open_checkpoint",
    "read_header",
    "write_index",
    "write_safetensors",
]
