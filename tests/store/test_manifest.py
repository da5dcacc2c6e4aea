"""The manifest file: the same back, and nothing else accepted."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from blake3 import blake3

from dsv4_convert.errors import BadInput
from dsv4_convert.store import ArrayLayout, LeafRecord, Manifest
from dsv4_convert.store.layout import DTYPES

BLAKE = [f"blake3:{blake3(bytes([value])).hexdigest()}" for value in range(4)]
SHA = [hashlib.sha256(bytes([value])).hexdigest() for value in range(4)]


@pytest.fixture
def manifest() -> Manifest:
    stacked = ArrayLayout(shape=(3, 4), dtype=DTYPES["bfloat16"], chunk_shape=(1, 4))
    scalar = ArrayLayout(shape=(), dtype=DTYPES["float32"], chunk_shape=())
    return Manifest(
        leaves={
            "layers.0.w": LeafRecord(layout=stacked, chunk_digests=tuple(BLAKE[:3]), sources=("a", "b"), rule="stack"),
            "head": LeafRecord(layout=scalar, chunk_digests=(BLAKE[3],)),
        },
        files={"config.json": BLAKE[0]},
        metadata={"revision": "abc", "nested": {"list": [1, None, "ü"]}},
    )


def test_round_trip_and_stable_bytes(manifest: Manifest) -> None:
    data = manifest.to_bytes()
    assert Manifest.from_bytes(data, where="here") == manifest
    assert replace(manifest, leaves=dict(reversed(manifest.leaves.items()))).to_bytes() == data


def test_one_line_per_leaf_with_the_documented_digest(manifest: Manifest) -> None:
    lines = [line for line in manifest.to_bytes().decode().splitlines() if line.startswith('  "')]
    assert [line.split('"')[1] for line in lines] == ["head", "layers.0.w"]
    entry = json.loads(lines[1].partition(": ")[2])
    raw = bytes.fromhex("".join(digest.removeprefix("blake3:") for digest in BLAKE[:3]))
    assert entry["digest"] == f"blake3:{blake3(raw).hexdigest()}"


def test_a_manifest_of_version_1_has_sha_256(manifest: Manifest) -> None:
    document = json.loads(manifest.to_bytes())
    document |= {"schema_version": 1, "files": {"config.json": SHA[0]}}
    for path, digests in {"layers.0.w": SHA[:3], "head": SHA[3:]}.items():
        whole = hashlib.sha256(bytes.fromhex("".join(digests))).hexdigest()
        document["leaves"][path] |= {"chunk_digests": digests, "digest": whole}
    del document["manifest_digest"]
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    document["manifest_digest"] = hashlib.sha256(text.encode()).hexdigest()
    read = Manifest.from_bytes(json.dumps(document).encode(), where="here")
    assert (read.leaves["layers.0.w"].chunk_digests, read.files) == (tuple(SHA[:3]), {"config.json": SHA[0]})
    document["leaves"]["head"]["digest"] = SHA[0]
    with pytest.raises(BadInput, match="the chunk digests give"):
        Manifest.from_bytes(json.dumps(document).encode(), where="here")


def test_every_flipped_bit_is_noticed(manifest: Manifest) -> None:
    data = manifest.to_bytes()
    for position in range(8 * (len(data) - 1)):  # the last byte is the line feed after the document
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(BadInput):
            Manifest.from_bytes(bytes(damaged), where="here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda top: top.update(schema_version=3), "schema_version is 3"),
        (lambda top: top.pop("schema_version"), "schema_version is None"),
        (lambda top: top.update(extra=1), "unknown keys: extra"),
        (lambda top: top.pop("files"), "missing or unknown keys: files"),
        (lambda top: top.update(files=[]), "files is list"),
        (lambda top: top["files"].update({"../x": SHA[0]}), "not a plain file name"),
        (lambda top: top["files"].update({"x": "12"}), "64 lower-case"),
        (lambda top: top["leaves"].update({"../x": top["leaves"]["head"]}), "'../x' is not a dotted path"),
        (lambda top: top["leaves"].update({"head.x": top["leaves"]["head"]}), "lies below 'head'"),
        (lambda top: top["leaves"]["head"].update(dtype="float64"), "head: dtype 'float64'"),
        (lambda top: top["leaves"]["head"].update(rule=1), "rule is 1"),
        (lambda top: top["leaves"]["head"].update(shape=[True]), "shape is .* expected a list of integers"),
        (lambda top: top["leaves"]["head"].update(shape=[2], chunk_shape=[1]), "1 chunk digests for 2 chunks"),
        (lambda top: top["leaves"]["head"].update(digest=SHA[0]), "but the chunk digests give"),
        (lambda top: top["leaves"]["head"].update(sources="a"), "sources is not a list of strings"),
        (lambda top: top["leaves"]["head"].update(chunk_digests=["G" * 64]), "64 lower-case"),
        (lambda top: top["leaves"].update(head=[]), "head: list instead of an object"),
        (lambda top: top["metadata"].update(revision="other"), "but the content gives"),
        (lambda top: top["leaves"]["layers.0.w"].update(shape=[3, 3]), "but the content gives"),
    ],
)
def test_strict_reading(manifest: Manifest, change: Callable[[dict[str, Any]], object], message: str) -> None:
    document = json.loads(manifest.to_bytes())
    change(document)
    with pytest.raises(BadInput, match=message) as caught:
        Manifest.from_bytes(json.dumps(document).encode(), where="some/file")
    assert str(caught.value).startswith("some/file: ")


def test_all_problems_are_reported_together(manifest: Manifest) -> None:
    document = json.loads(manifest.to_bytes())
    for entry in document["leaves"].values():
        entry["rule"] = 1
    with pytest.raises(BadInput, match=re.compile(r"head: rule.*layers\.0\.w: rule", re.DOTALL)):
        Manifest.from_bytes(json.dumps(document).encode(), where="here")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "here: not JSON"),
        (b"\xff\xfe", "here: not UTF-8"),
        (b"[]", "expected a JSON object, found list"),
        (b"{}", "schema_version is None"),
        (b'{"schema_version": 1, "schema_version": 1}', "key 'schema_version' appears twice"),
    ],
)
def test_other_files_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Manifest.from_bytes(data, where="here")
