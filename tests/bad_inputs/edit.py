"""Changing a healthy checkpoint, byte by byte and without the code under test."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoint.safetensors_files import raw_file

from .case import Place

Array = np.ndarray[Any, Any]


@dataclasses.dataclass
class Tensor:
    """One tensor of a file."""

    dtype: str
    shape: list[int]
    data: bytes


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def load(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, in the order of their bytes."""
    header, data = split(file)
    header.pop("__metadata__", None)
    return {
        name: Tensor(entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }


def save(file: Path, tensors: dict[str, Tensor]) -> None:
    """A valid file of these tensors."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        data += tensor.data
    file.write_bytes(raw_file(header, data))


def in_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Place], None]:
    """Changes the header of layer 0's shard and nothing else; the offsets stay those of the data."""

    def edit(place: Place) -> None:
        header, data = split(place.shard)
        change(header)
        place.shard.write_bytes(raw_file(header, data))

    return edit


def in_text(change: Callable[[bytes], bytes]) -> Callable[[Place], None]:
    """Changes the header of layer 0's shard as text; its length is stated rightly."""

    def edit(place: Place) -> None:
        content = place.shard.read_bytes()
        length = int.from_bytes(content[:8], "little")
        text = content[8 : 8 + length]
        changed = change(text)
        assert changed != text
        place.shard.write_bytes(raw_file(changed, content[8 + length :]))

    return edit


def in_bytes(change: Callable[[bytearray], bytes | bytearray | None]) -> Callable[[Place], None]:
    """Changes the bytes of layer 0's shard."""

    def edit(place: Place) -> None:
        content = bytearray(place.shard.read_bytes())
        changed = change(content)
        place.shard.write_bytes(content if changed is None else changed)

    return edit


def in_tensors(change: Callable[[dict[str, Tensor]], object], *, index: bool = True) -> Callable[[Place], None]:
    """Changes the tensors of all shards at once, by name. New ones go to layer 0's shard; the index follows."""

    def edit(place: Place) -> None:
        files = sorted(place.source.glob("*.safetensors"))
        of_file = {file: load(file) for file in files}
        everything = {name: tensor for tensors in of_file.values() for name, tensor in tensors.items()}
        change(everything)
        place_of = {name: file for file, tensors in of_file.items() for name in tensors}
        for file in files:
            save(file, {name: one for name, one in everything.items() if place_of.get(name, place.shard) == file})
        if index:
            weight_map = {name: place_of.get(name, place.shard).name for name in everything}
            place.index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))

    return edit


def in_array(name: str, dtype: Any, change: Callable[[Array], object]) -> Callable[[Place], None]:
    """Changes the content of one tensor in place, as an array of ``dtype``."""

    def edit(tensors: dict[str, Tensor]) -> None:
        array = np.frombuffer(tensors[name].data, dtype).reshape(tensors[name].shape).copy()
        change(array)
        tensors[name].data = array.tobytes()

    return in_tensors(edit)


def in_json(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Place], None]:
    """Changes a JSON file of the source."""

    def edit(place: Place) -> None:
        path = place.source / file
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return edit


def in_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Place], None]:
    """Changes config.json."""
    return in_json("config.json", change)


def in_index(change: Callable[[dict[str, str]], object]) -> Callable[[Place], None]:
    """Changes the index's map from tensors to shards."""
    return in_json("model.safetensors.index.json", lambda document: change(document["weight_map"]))


def rewrite(file: Path, content: bytes) -> None:
    """Replace a file, not what a link of it shares."""
    file.unlink()
    file.write_bytes(content)


def flip(file: Path, position: int, bit: int = 0x10) -> None:
    """Flip a bit of a file."""
    content = bytearray(file.read_bytes())
    content[position] ^= bit
    rewrite(file, bytes(content))


def manifest_again(orbax: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest of a converted checkpoint and state the digest that belongs to it, as a forger would."""
    file = orbax / "dsv4_manifest.json"
    document = json.loads(file.read_bytes())
    change(document)
    document.pop("manifest_digest")
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    document["manifest_digest"] = hashlib.sha256(text.encode()).hexdigest()
    rewrite(file, json.dumps(document).encode())


def chunk(orbax: Path, leaf: str) -> Path:
    """The first chunk of a leaf."""
    return min(file for file in (orbax / leaf).iterdir() if not file.name.startswith("."))
