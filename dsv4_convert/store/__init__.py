"""Orbax checkpoints, written in bounded memory and resumably, and read back leaf by leaf and slice by slice."""

from __future__ import annotations

from dsv4_convert.store.arrays import Compression
from dsv4_convert.store.beside import unaccounted
from dsv4_convert.store.destination import Destination
from dsv4_convert.store.layout import ArrayLayout, chunk_digest, row_chunks
from dsv4_convert.store.locate import as_path, open_destination
from dsv4_convert.store.manifest import LeafRecord, Manifest
from dsv4_convert.store.processes import ALONE, Processes
from dsv4_convert.store.reader import Store, open_store, verify
from dsv4_convert.store.writer import CheckpointWriter, Chunk, LeafSpec, WriteSummary

__all__ = [
    "ALONE",
    "ArrayLayout",
    "CheckpointWriter",
    "Chunk",
    "Compression",
    "Destination",
    "LeafRecord",
    "LeafSpec",
    "Manifest",
    "Processes",
    "Store",
    "WriteSummary",
    "as_path",
    "chunk_digest",
    "open_destination",
    "open_store",
    "row_chunks",
    "unaccounted",
    "verify",
]
