"""Building safetensors files byte by byte, valid ones and broken ones, without the code under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def raw_file(header: bytes | dict[str, Any], data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a file: length (of the header, unless given), header, data."""
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def u8_header(sizes: dict[str, int], *, begin: int = 0) -> dict[str, Any]:
    """A header of byte vectors, one after the other."""
    header, position = {}, begin
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [position, position + size]}
        position += size
    return header


def write_u8_shard(path: Path, tensors: dict[str, bytes]) -> None:
    """A valid shard of byte vectors with the given content."""
    header = u8_header({name: len(content) for name, content in tensors.items()})
    path.write_bytes(raw_file(header, b"".join(tensors.values())))


def write_folder(root: Path, shards: dict[str, dict[str, bytes]], **config: Any) -> Path:
    """A valid checkpoint folder: config, index and shards of byte vectors."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps({"model_type": "tiny", **config}))
    for shard, tensors in shards.items():
        write_u8_shard(root / shard, tensors)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    return root
