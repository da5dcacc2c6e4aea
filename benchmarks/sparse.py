"""A checkpoint of full size laid out as sparse files: true headers, true sizes, almost no disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsv4_convert.checkpoint import write_index
from dsv4_convert.checkpoint.header import LENGTH_BYTES, stored_nbytes

Entry = tuple[str, tuple[int, ...]]
_BLOCK = 1 << 24


def tensors_of(inventory: Path) -> dict[str, Entry]:
    """Name -> dtype and shape of every tensor that an inventory describes; ``{e}`` in a name stands for the experts."""
    document = json.loads(inventory.read_text(encoding="utf-8"))
    found: dict[str, Entry] = {}
    for name, (dtype, shape) in document["tensors"].items():
        experts = range(document["n_experts"]) if "{e}" in name else (None,)
        for expert in experts:
            found[name if expert is None else name.replace("{e}", str(expert))] = (dtype, tuple(shape))
    return found


def lay_out(
    tensors: Mapping[str, Entry], config: Path, folder: Path, *, shards: int, filled: Callable[[str], bool]
) -> None:
    """Write the folder.

    Args:
        tensors: dtype and shape by name, in the order of the files.
        config: config.json to copy.
        folder: the folder to create.
        shards: number of files, of about equal size; fewer, where a tensor is larger than that.
        filled: whether a tensor, by name, gets plausible random content; the others read as zeros.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(config.read_bytes())
    total = sum(stored_nbytes(*entry) for entry in tensors.values())
    groups: list[dict[str, Entry]] = [{} for _ in range(shards)]
    position = 0
    for name, entry in tensors.items():
        groups[min(shards - 1, position * shards // total)][name] = entry
        position += stored_nbytes(*entry)
    weight_map = {}
    groups = [group for group in groups if group]  # a tensor may be larger than its share
    for number, group in enumerate(groups, 1):
        shard = f"model-{number:05}-of-{len(groups):05}.safetensors"
        content = {
            name: _content(name, dtype, stored_nbytes(dtype, shape))
            for name, (dtype, shape) in group.items()
            if filled(name)
        }
        write_shard(folder / shard, group, content)
        weight_map.update(dict.fromkeys(group, shard))
    write_index(folder, weight_map, total)


def write_shard(file: Path, tensors: Mapping[str, Entry], content: Mapping[str, Iterable[bytes]]) -> None:
    """Write one safetensors file. Tensors without ``content`` are holes: they read as zeros and take no disk."""
    header: dict[str, Any] = {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        size = stored_nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        start = os.write(descriptor, len(text).to_bytes(LENGTH_BYTES, "little") + text)
        os.ftruncate(descriptor, start + position)
        for name, blocks in content.items():
            position = start + header[name]["data_offsets"][0]
            for block in blocks:
                position += os.pwrite(descriptor, block, position)
    finally:
        os.close(descriptor)


_blocks: dict[str, bytes] = {}


def _content(name: str, dtype: str, nbytes: int) -> Iterator[bytes]:
    """Plausible content: one random block for each dtype, rotated by the name so that no two tensors are alike."""
    block = _blocks.setdefault(dtype, _block(dtype))
    turn = sum(name.encode()) * 4096 % len(block)
    turned = block[turn:] + block[:turn]
    for start in range(0, nbytes, len(block)):
        yield turned[: nbytes - start]


def _block(dtype: str) -> bytes:
    rng = np.random.default_rng(sum(dtype.encode()))
    match dtype:
        case "F8_E4M3":
            return (
                rng.integers(0, 0x7F, _BLOCK, np.uint8) | rng.choice(np.array([0, 128], np.uint8), _BLOCK)
            ).tobytes()
        case "F8_E8M0":
            return rng.integers(110, 131, _BLOCK, np.uint8).tobytes()
        case "BF16":
            return rng.uniform(0.02, 1, _BLOCK // 2).astype(ml_dtypes.bfloat16).tobytes()
        case "F32":
            return rng.uniform(0.02, 1, _BLOCK // 4).astype(np.float32).tobytes()
        case "I64":
            return rng.integers(0, 256, _BLOCK // 8).astype(np.int64).tobytes()
        case _:
            return rng.integers(0, 256, _BLOCK, np.uint8).tobytes()
