"""Orbax checkpoints, written in bounded memory and resumably, and read back leaf by leaf and slice by slice."""

from __future__ import annotations

from dsv4_convert.store.arrays import Compression
from dsv4_convert.store.beside import unaccounted
from dsv4_convert.store.layout import ArrayLayout, chunk_digest, row_chunks
from dsv4_convert.store.manifest import LeafRecord, Manifest
from dsv4_convert.store.places import Place, as_path, place_of
from dsv4_convert.store.processes import ALONE, Processes
from dsv4_convert.store.reader import Store, open_store, verify
from dsv4_convert.store.writer import CheckpointWriter, Chunk, LeafSpec, WriteSummary

__all__ = [
    "ALONE",
    "ArrayLayout",
    "CheckpointWriter",
    "Chunk",
    "Compression",
    "LeafRecord",
    "LeafSpec",
    "Manifest",
    "Place",
    "Processes",
    "Store",
    "WriteSummary",
    "as_path",
    "chunk_digest",
    "open_store",
    "place_of",
    "row_chunks",
    "unaccounted",
    "verify",
]
