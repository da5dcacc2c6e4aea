"""Every reader of a file that somebody else may have written, as a function of bytes: a harness each.

A harness returns whether the reader accepted the bytes, and must not raise. An accepted value has to agree with the
bytes: writing it gives the same file, and safetensors have the tensors that the library finds. A refusal has to be a
:class:`Dsv4Error` whose message a terminal can print.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from dsv4_convert.checkpoint.dtypes import DTYPES as TENSOR_DTYPES
from dsv4_convert.checkpoint.header import Header, TensorInfo, read_header_by_ranges
from dsv4_convert.checkpoint.index import is_shard_name, read_weight_map
from dsv4_convert.convert.sources import Shard, Sources, SourceTensor
from dsv4_convert.errors import BadInput, Dsv4Error, listed
from dsv4_convert.golden.archive import Golden, digest
from dsv4_convert.golden.compact import MAX_NUMBERS, Compact
from dsv4_convert.golden.manifest import GoldenManifest, StoredTap, layer_file
from dsv4_convert.golden.synthetic import tiny_config
from dsv4_convert.golden.writer import REQUEST_NAME
from dsv4_convert.inspection.converted import inspect_conversion
from dsv4_convert.inspection.recorded import inspect_recording
from dsv4_convert.spec.config import Config
from dsv4_convert.store import ArrayLayout, LeafRecord
from dsv4_convert.store import Manifest as StoreManifest
from dsv4_convert.store.arrays import StoredArray, array_metadata
from dsv4_convert.store.digests import is_digest
from dsv4_convert.store.export_state import read_export_state
from dsv4_convert.store.journal import Journal
from dsv4_convert.store.layout import ARRAY_METADATA_FILE, DTYPES

from .mutation import header_of

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
GOLDEN = Path(__file__).parents[2] / "golden" / "data" / "tiny"

SHA = [hashlib.sha256(bytes([value])).hexdigest() for value in range(4)]
#: A message that is longer repeats what somebody else wrote.
MAX_MESSAGE = 20_000
Harness = Callable[[bytes, Path], bool]


@dataclass(frozen=True)
class Reader:
    """One reader: what its files look like, and how to read bytes as one, with a folder for what has to be a file."""

    seeds: Callable[[], list[bytes]]
    read: Harness
    #: Time of an execution, relative to the quickest harness.
    cost: int = 1


class Disagreement(AssertionError):
    """Something was accepted that the bytes do not say."""


def accepts(reader: Reader, data: bytes, folder: Path) -> bool:
    """Run a harness. Raises whatever is a finding."""
    try:
        return reader.read(data, folder)
    except Dsv4Error as error:
        message = str(error)
        message.encode()  # a lone surrogate would end in an exception on the terminal
        _agree(message.replace("\n", "").isprintable(), f"a message with control characters: {message[:200]!r}")
        _agree(len(message) <= MAX_MESSAGE, f"a message of {len(message)} characters: {message[:200]!r}")
        return False


def _agree(holds: bool, what: str) -> None:
    if not holds:
        raise Disagreement(what)


# --- safetensors ------------------------------------------------------------------------------------------------------


def _header(data: bytes, folder: Path) -> bool:
    try:
        tensors = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
        library = {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in tensors}
    except safetensors.SafetensorError:
        library = None
    header = read_header_by_ranges(Path("x.safetensors"), len(data), lambda start, stop: data[start:stop])
    found = {name: (info.dtype, info.shape, data[info.start : info.end]) for name, info in header.tensors.items()}
    _agree(found == library, f"accepted, and the library gives {'nothing' if library is None else 'other tensors'}")
    parts = header_of(data)
    _agree(parts is not None and _keys_are_unique(parts[0]), "accepted, and a key occurs twice")
    return True


def _keys_are_unique(text: bytes) -> bool:
    unique = True

    def look(pairs: list[tuple[str, Any]]) -> None:
        nonlocal unique
        unique &= len({key for key, _ in pairs}) == len(pairs)

    json.loads(text, object_pairs_hook=look)
    return unique


def _header_seeds() -> list[bytes]:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "layers.0.w": np.arange(6, dtype=np.int8).reshape(2, 3),
        "b": np.array([1, np.nan], np.float32),
        "e": np.zeros(0),
    }
    files = [safetensors.numpy.save(arrays, {"format": "pt"}), safetensors.numpy.save({})]
    codes = {
        "w1.weight": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]},
        "w1.scale": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [4, 6]},
        "wq.weight": {"dtype": "F8_E4M3", "shape": [1, 2], "data_offsets": [6, 8]},
    }
    text = json.dumps(codes).encode()
    return [*files, struct.pack("<Q", len(text)) + text + b"abcdefgh"]


# --- JSON of a checkpoint ---------------------------------------------------------------------------------------------


def _index(data: bytes, folder: Path) -> bool:
    weight_map = read_weight_map(_file(folder, "model.safetensors.index.json", data))
    _agree(all(is_shard_name(shard) for shard in weight_map.values()), "accepted a name that leads elsewhere")
    _agree(bool(weight_map) and json.loads(data)["weight_map"] == weight_map, "accepted another map")
    _agree(_keys_are_unique(data), "accepted, and a key occurs twice")
    return True


def _index_seeds() -> list[bytes]:
    shards = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    return [json.dumps({"metadata": {"total_size": 12}, "weight_map": shards}).encode()]


def _config(data: bytes, folder: Path) -> bool:
    config = Config.from_file(_file(folder, "config.json", data))
    _agree(Config.from_json(json.loads(json.dumps(config.to_json()))) == config, "what is stored is another config")
    _agree(not config.inconsistent(), "a config that contradicts itself")
    _agree(_keys_are_unique(data), "accepted, and a key occurs twice")
    return True


def _config_seeds() -> list[bytes]:
    return [json.dumps(tiny_config()).encode(), *(path.read_bytes() for path in sorted(CONFIGS.glob("*.json")))]


def _stored_config(data: bytes, folder: Path) -> bool:
    """The config as manifests keep it, under their digest."""
    document = _parsed(data)
    _agree(_same(Config.from_json(document).to_json(), document), "accepted, and writes another config")
    return True


def _stored_config_seeds() -> list[bytes]:
    return [json.dumps(Config.from_hf(tiny_config()).to_json()).encode()]


# --- A converted checkpoint -------------------------------------------------------------------------------------------


def _manifest(data: bytes, folder: Path) -> bool:
    written = json.loads(StoreManifest.from_bytes(data, where="dsv4_manifest.json").to_bytes())
    document = json.loads(data)
    # An older version is written as the newest, whose own digest has another function.
    written |= {key: document[key] for key in ("schema_version", "manifest_digest")}
    _agree(_same(written, document), "accepted, and writes another manifest")
    _agree(_keys_are_unique(data), "accepted, and a key occurs twice")
    return True


def _sealed_manifest(data: bytes, folder: Path) -> bool:
    return _manifest(_sealed(data, ensure_ascii=False), folder)


def _manifest_seeds() -> list[bytes]:
    stacked = ArrayLayout(shape=(3, 4), dtype=DTYPES["bfloat16"], chunk_shape=(1, 4))
    scalar = ArrayLayout(shape=(), dtype=DTYPES["float32"], chunk_shape=())
    leaves = {
        "layers.0.w": LeafRecord(layout=stacked, chunk_digests=tuple(SHA[:3]), sources=("a", "b"), rule="stack"),
        "head": LeafRecord(layout=scalar, chunk_digests=(SHA[3],)),
    }
    metadata = {"revision": "abc", "layers": [0, 1], "nested": {"list": [1, None, "ü"]}}
    return [StoreManifest(leaves=leaves, files={"config.json": SHA[0]}, metadata=metadata).to_bytes()]


def _sources(data: bytes, folder: Path) -> bool:
    sources = Sources.from_bytes(data, where="dsv4_sources.json")
    _agree(Sources.from_bytes(sources.to_bytes(), where="") == sources, "accepted, and writes another account")
    for tensor in sources.tensors.values():
        texts = (tensor.shard, tensor.dtype, *tensor.targets, tensor.digest or "", tensor.dropped or "")
        _agree(all(isinstance(text, str) for text in texts), "accepted what is no text")
        _agree(all(type(extent) is int and extent >= 0 for extent in tensor.shape), "accepted what is no shape")
    return True


def _sources_seeds() -> list[bytes]:
    shard = "model-00001-of-00001.safetensors"
    tensors = {
        "a.weight": SourceTensor(shard=shard, dtype="F8_E4M3", shape=(2, 3), digest=SHA[0], targets=("a", "b")),
        "mtp.0.x": SourceTensor(shard=shard, dtype="BF16", shape=(), dropped="a draft"),
    }
    return [Sources(shards={shard: Shard(size=99, sha256=SHA[1]), "b": Shard(size=0)}, tensors=tensors).to_bytes()]


def _array(data: bytes, folder: Path) -> bool:
    layout = StoredArray.open(_file(folder, ARRAY_METADATA_FILE, data).parent).layout
    document = json.loads(data)
    _agree(_same(document["shape"], list(layout.shape)), "accepted what is no shape")
    _agree(_same(document["chunks"], list(layout.chunk_shape)), "accepted what is no chunk shape")
    _agree(_keys_are_unique(data), "accepted, and a key occurs twice")
    return True


def _array_seeds() -> list[bytes]:
    layout = ArrayLayout(shape=(3, 4), dtype=DTYPES["bfloat16"], chunk_shape=(1, 4))
    codes = ArrayLayout(shape=(), dtype=DTYPES["int64"], chunk_shape=())
    return [array_metadata(layout, "none"), array_metadata(codes, "zstd")]


_PLAN = {
    "journal_version": 3,
    "compression": "none",
    "leaves": SHA[0],
    "fingerprint.layout": "dsv4",
    "fingerprint.storage": "bfloat16",
}


def _journal(data: bytes, folder: Path) -> bool:
    journal = Journal.open(_file(folder, "journal.jsonl", data).parent, plan=_PLAN)
    for path, chunks in journal.chunks.items():
        for index, text in chunks.items():
            _agree(type(path) is str and all(type(at) is int for at in index), "accepted what is no chunk")
            _agree(is_digest(text), "accepted what is no digest")
    _agree(all(type(name) is str for name in journal.side_records), "accepted what is no note")
    return bool(journal.chunks)


def _looked_at(data: bytes, folder: Path) -> bool:
    """The journal of whatever plan, for looking only."""
    journal = Journal.found(_file(folder, "journal.jsonl", data).parent)
    place = inspect_conversion(folder, place="partial", known_by="journal.jsonl")
    _agree(place.facts["stored"].startswith(f"{sum(map(len, journal.chunks.values()))} of 0 chunks"), "other chunks")
    return True


def _request(data: bytes, folder: Path) -> bool:
    _file(folder, REQUEST_NAME, data)
    found = inspect_recording(folder, place="partial", known_by=REQUEST_NAME)
    _agree(found.config is not None and _keys_are_unique(data), "accepted, and a key occurs twice")
    return True


def _request_seeds() -> list[bytes]:
    return [json.dumps(GoldenManifest.from_bytes(_small_golden()[0], where="").request.to_json()).encode()]


def _export(data: bytes, folder: Path) -> bool:
    of, shards = read_export_state(_file(folder, "export.json", data))
    entries = {shard: {"identical": one.identical, "quantized": one.quantized} for shard, one in shards.items()}
    _agree(_same({"of": of, "shards": entries}, json.loads(data)), "accepted, and writes another state")
    return True


def _export_seeds() -> list[bytes]:
    shards = {"model-00001-of-00002.safetensors": {"identical": 3, "quantized": {"a.weight": 0, "b.weight": 2}}}
    return [json.dumps({"of": {"manifest": SHA[0], "requantize": True}, "shards": shards}).encode()]


def _journal_seeds() -> list[bytes]:
    journal = Journal(Path(), _PLAN)
    journal.chunks = {"layers.0.w": {(0, 0): SHA[0], (1, 0): SHA[1]}, "head": {(): SHA[2]}}
    journal.side_records = {"a.weight": {"digests": {"a.weight": SHA[3]}, "rounding": {"values": 6}}}
    return [journal.whole()]


# --- A golden ---------------------------------------------------------------------------------------------------------


def _golden_manifest(data: bytes, folder: Path) -> bool:
    written = GoldenManifest.from_bytes(data, where="manifest.json").to_bytes()
    _agree(_same(json.loads(written), json.loads(data)), "accepted, and writes another manifest")
    _agree(_keys_are_unique(data), "accepted, and a key occurs twice")
    return True


def _sealed_golden_manifest(data: bytes, folder: Path) -> bool:
    return _golden_manifest(_sealed(data, ensure_ascii=True), folder)


def _golden_manifest_seeds() -> list[bytes]:
    return [_small_golden()[0]]


def _golden_file(data: bytes, folder: Path) -> bool:
    """One file of a golden, of which nothing but what was recorded may be accepted."""
    manifest, files = _small_golden()
    golden = Golden(
        Path("golden"), _Files({**files, layer_file(0): data}), GoldenManifest.from_bytes(manifest, where="x")
    )
    golden.check_files()
    if problems := golden.verify():
        raise BadInput(listed(problems))
    found, recorded = safetensors.numpy.load(data), safetensors.numpy.load(files[layer_file(0)])
    _agree(found.keys() == recorded.keys(), "accepted other arrays")
    _agree(all(found[name].tobytes() == array.tobytes() for name, array in recorded.items()), "accepted other numbers")
    return True


@dataclass
class _Files:
    """The files of a golden, in memory."""

    data: Mapping[str, bytes]

    def content(self, name: str) -> bytes | None:
        raise NotImplementedError

    def header(self, name: str) -> Header:
        data = self.data[name]
        return read_header_by_ranges(Path(name), len(data), lambda start, stop: data[start:stop])

    def array(self, name: str, info: TensorInfo) -> Any:
        raw = np.frombuffer(self.data[name][info.start : info.end], np.uint8)
        return raw.view(TENSOR_DTYPES[info.dtype].array).reshape(info.shape)


@cache
def _small_golden() -> tuple[bytes, dict[str, bytes]]:
    """The committed golden's manifest, cut down to its first layer and two tokens, and its files with other numbers.

    A mutation of the whole one takes fifty times as long, and its last part differs from the first in nothing.
    """
    committed = GoldenManifest.from_bytes((GOLDEN / "manifest.json").read_bytes(), where="manifest.json").request
    request = dataclasses.replace(
        committed, tokens=((1, 2),), layers=(0,), noise=(), compact=Compact(positions=(1,), numbers=MAX_NUMBERS)
    )
    random = np.random.default_rng(0)
    files: dict[str, dict[str, Any]] = {}
    taps = {}
    for name, (layer, dtype, shape) in request.arrays().items():
        array = random.integers(0, 9, shape).astype(dtype)
        files.setdefault(layer_file(layer), {})[name] = array
        sha256 = digest(array, request.prompt_digest)
        taps[name] = StoredTap(file=layer_file(layer), dtype=dtype.name, shape=shape, sha256=sha256)
    manifest = GoldenManifest(request=request, taps=taps, aliases={})
    return manifest.to_bytes(), {name: safetensors.numpy.save(arrays) for name, arrays in files.items()}


# --- What they share --------------------------------------------------------------------------------------------------


def _file(folder: Path, name: str, data: bytes) -> Path:
    file = folder / name
    file.write_bytes(data)
    return file


def _parsed(data: bytes) -> Any:
    """The value that Python's parser returns; None if it is not JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _same(one: Any, other: Any) -> bool:
    """Whether two documents are the same, 1, 1.0 and true not being so."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _sealed(data: bytes, *, ensure_ascii: bool) -> bytes:
    """A manifest with the digest that belongs to its content, as somebody would make it who means harm."""
    document = _parsed(data)
    if not isinstance(document, dict):
        return data
    document.pop("manifest_digest", None)
    try:
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=ensure_ascii)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return json.dumps({**document, "manifest_digest": digest}).encode()
    except (ValueError, RecursionError):
        return data


READERS: dict[str, Reader] = {
    "header": Reader(_header_seeds, _header),
    "index": Reader(_index_seeds, _index),
    "config": Reader(_config_seeds, _config, cost=3),
    "stored config": Reader(_stored_config_seeds, _stored_config),
    "manifest": Reader(_manifest_seeds, _manifest),
    "manifest, sealed": Reader(_manifest_seeds, _sealed_manifest),
    "sources": Reader(_sources_seeds, _sources),
    "array": Reader(_array_seeds, _array),
    "journal": Reader(_journal_seeds, _journal),
    "journal, looked at": Reader(_journal_seeds, _looked_at),
    "export": Reader(_export_seeds, _export),
    "request": Reader(_request_seeds, _request, cost=3),
    "golden manifest": Reader(_golden_manifest_seeds, _golden_manifest, cost=8),
    "golden manifest, sealed": Reader(_golden_manifest_seeds, _sealed_golden_manifest, cost=8),
    "golden file": Reader(lambda: [_small_golden()[1][layer_file(0)]], _golden_file, cost=8),
}
