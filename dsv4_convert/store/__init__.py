"""Orbax checkpoints, written in bounded memory and resumably, and read back leaf by leaf and slice by slice."""

from __future__ import annotations

from dsv4_convert.store.layout import ArrayLayout, row_chunks
from dsv4_convert.store.manifest import LeafRecord, Manifest
from dsv4_convert.store.reader import Store, open_store, verify
from dsv4_convert.store.writer import LeafSpec, WriteSummary, write_checkpoint

__all__ = [
    "ArrayLayout",
    "LeafRecord",
    "LeafSpec",
    "Manifest",
    "Store",
    "WriteSummary",
    "open_store",
    "row_chunks",
    "verify",
    "write_checkpoint",
]
