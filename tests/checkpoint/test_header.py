"""The header reader: a table of bad files, and a differential fuzz against the safetensors library."""

from __future__ import annotations

import copy
import gzip
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dsv4_convert.checkpoint import read_header
from dsv4_convert.checkpoint.dtypes import DTYPES
from dsv4_convert.errors import BadInput

from .safetensors_files import raw_file, u8_header

VALID = raw_file(u8_header({"a": 3, "b": 2}), b"abcde")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def entry(dtype: str = "U8", shape: Any = (2,), offsets: Any = (0, 2), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def one(text: str, data: bytes = b"ab") -> bytes:
    """A file whose header is exactly ``text``."""
    return raw_file(text.encode(), data)


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "F01 empty": (b"", "empty"),
    "F02 too short": (b"\x02\0\0", "too short"),
    "F03 header beyond the file": (raw_file(u8_header({"a": 3}), b"abc", length=4000), "truncated"),
    "F04 length 2**63": (raw_file(b"{}", length=1 << 63), "not a safetensors file"),
    "F05 header over 100 MB": (raw_file(b"{}", length=100_000_001), "100 MB"),
    "F06 not UTF-8": (raw_file(b'{"\xff":{}}'), "not UTF-8"),
    "F07 not JSON": (raw_file(b'{"a": oops}'), "not JSON"),
    "F07 cut JSON": (raw_file(b'{"a": {"dtype"'), "not JSON"),
    "F08 leading space": (raw_file(b" {}"), "begin with '{'"),
    "F09 array at the root": (raw_file(b"[]"), "begin with '{'"),
    "F10 deep JSON": (raw_file(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), "nested too deeply"),
    "F11 LFS pointer": (POINTER, "git lfs pull"),
    "F12 HTML page": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "a web page"),
    "F12 JSON answer": (b'{"error":"Repository not found"}', "error answer"),
    "F13 gzip": (gzip.compress(VALID), "gzip"),
    "F13 zip": (b"PK\x03\x04" + b"\0" * 40, "ZIP"),
    "F13 pickle": (b"\x80\x02}q\x00." + b"\0" * 40, "pickle"),
    "F19 truncated by a byte": (VALID[:-1], "truncated"),
    "F19 truncated at a tensor": (VALID[:-2], "truncated"),
    "F19 truncated in the header": (VALID[:40], "truncated"),
    "F20 trailing byte": (VALID + b"\0", "1 bytes after the last tensor"),
    "F23 zeros": (b"\0" * 4096, "full of zeros"),
    "H01 duplicate, same": (one('{"a":%s,"a":%s}' % ((json.dumps(entry()),) * 2)), "'a' appears twice"),
    "H01 duplicate, other dtype": (
        one(f'{{"a":{json.dumps(entry())},"a":{json.dumps(entry("I8"))}}}'),
        "'a' appears twice",
    ),
    "H01 duplicate field": (one('{"a":{"dtype":"U8","dtype":"I8","shape":[2],"data_offsets":[0,2]}}'), "appears twice"),
    "H02 overlap": (raw_file({"a": entry(), "b": entry(offsets=[1, 3])}, b"abc"), "b: overlaps a"),
    "H02 twice the same": (raw_file({"a": entry(), "b": entry()}, b"ab"), "overlaps"),
    "H02 empty inside": (raw_file({"a": entry(), "b": entry(shape=[0], offsets=[1, 1])}, b"ab"), "overlaps"),
    "H03 hole": (raw_file({"a": entry(), "b": entry(offsets=[3, 5])}, b"abcde"), "b: leaves a hole after a"),
    "H03 hole at the start": (raw_file({"a": entry(offsets=[1, 3])}, b"abc"), "hole after the header"),
    "H04 negative offset": (raw_file({"a": entry(offsets=[-2, 0])}, b"ab"), "negative number -2"),
    "H04 negative shape": (raw_file({"a": entry(shape=[-2])}, b"ab"), "negative number -2"),
    "H04 minus zero": (one('{"a":{"dtype":"U8","shape":[2],"data_offsets":[-0,2]}}'), "negative number -0"),
    "H05 offset past the end": (raw_file({"a": entry(shape=[9], offsets=[0, 9])}, b"ab"), "truncated"),
    "H06 begin after end": (raw_file({"a": entry(offsets=[2, 0])}, b"ab"), "span -2"),
    "H07 shape and offsets": (raw_file({"a": entry("F32", shape=[2])}, b"ab"), "takes 8 bytes"),
    "H08 overflow": (raw_file({"a": entry(shape=[1 << 40, 1 << 40])}, b"ab"), "larger than any file"),
    "H08 overflow beside a zero": (
        raw_file({"a": entry(shape=[1 << 40, 1 << 40, 0], offsets=[0, 0])}),
        "larger than any file",
    ),
    "H08 huge integer": (one('{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,2]}}' % ("9" * 5000)), "digits"),
    "H09 unknown dtype": (raw_file({"a": entry("F7")}, b"ab"), "'F7' is not supported"),
    "H09 dtype not a string": (raw_file({"a": entry(dtype=3)}, b"ab"), "dtype has to be a string"),  # type: ignore[arg-type]
    "H10 empty name": (raw_file({"": entry()}, b"ab"), "1 to 1000 characters"),
    "H10 NUL in the name": (raw_file({"a\0b": entry()}, b"ab"), "do not print"),
    "H10 line end in the name": (raw_file({"a\nb": entry()}, b"ab"), "do not print"),
    "H10 direction mark in the name": (raw_file({"a\u202eb": entry()}, b"ab"), "do not print"),
    "H10 lone surrogate": (one(f'{{"\\ud800":{json.dumps(entry())}}}'), "not valid Unicode"),
    "H10 traversal": (raw_file({"../../etc/x": entry()}, b"ab"), "looks like a path"),
    "H10 traversal, backslash": (raw_file({"a\\..\\x": entry()}, b"ab"), "looks like a path"),
    "H10 absolute": (raw_file({"/etc/x": entry()}, b"ab"), "looks like a path"),
    "H10 very long": (raw_file({"a" * 1001: entry()}, b"ab"), "1 to 1000 characters"),
    "H13 odd F4": (raw_file({"a": entry("F4", shape=[3], offsets=[0, 1])}, b"a"), "has to be even"),
    "H13 odd rows of F4": (raw_file({"a": entry("F4", shape=[4, 1])}, b"ab"), "has to be even"),
    "H14 bool in the shape": (raw_file({"a": entry(shape=[True, 2])}, b"ab"), "list of integers"),
    "H14 float in the shape": (raw_file({"a": entry(shape=[2.0])}, b"ab"), "list of integers"),
    "H14 shape not a list": (raw_file({"a": entry(shape="2")}, b"ab"), "list of integers"),
    "H14 float offset": (raw_file({"a": entry(offsets=[0, 2.0])}, b"ab"), "two integers"),
    "H14 three offsets": (raw_file({"a": entry(offsets=[0, 1, 2])}, b"ab"), "two integers"),
    "H14 NaN": (one('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,2]}}'), "NaN is not a JSON number"),
    "H15 metadata not strings": (raw_file({"__metadata__": {"a": 1}}), "has to be a string, found int"),
    "H15 metadata not an object": (raw_file({"__metadata__": ["pt"]}), "expected an object, found list"),
    "H15 metadata with a surrogate": (one('{"__metadata__":{"a":"\\ud800"}}', b""), "not valid Unicode"),
    "unknown field": (raw_file({"a": entry(order="F")}, b"ab"), "expected the fields"),
    "missing field": (raw_file({"a": {"dtype": "U8", "shape": [2]}}, b"ab"), "expected the fields"),
    "entry not an object": (raw_file({"a": [1]}, b"ab"), "found 'list'"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(case: str, tmp_path: Path) -> None:
    content, expected = BAD_FILES[case]
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read_header(file)
    message = str(caught.value)
    assert str(file) in message
    assert expected in message
    assert message.isprintable() or message.replace("\n", "").isprintable()


def test_problems_are_listed_together(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(raw_file({f"t{number}": entry("F7") for number in range(30)}))
    with pytest.raises(BadInput, match=r"t19.*not supported(.|\n)*and 10 more"):
        read_header(file)


def test_paths_that_are_not_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    for path, expected in {
        tmp_path: "a folder",
        tmp_path / "missing": "no such file",
        tmp_path / "fifo": "a named pipe",
        Path("/dev/zero"): "a device",
        tmp_path / "dangling": "a link to gone",
        tmp_path / "loop": "leads back to itself",
    }.items():
        with pytest.raises(BadInput, match=expected):
            read_header(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(VALID)
    (tmp_path / "x").chmod(0)
    with pytest.raises(BadInput, match="permissions"):
        read_header(tmp_path / "x")


def test_legal_oddities(tmp_path: Path) -> None:
    """Scalars, empty tensors, non-ASCII names, metadata, padding, an empty header."""
    file = tmp_path / "x.safetensors"
    header = {
        "__metadata__": {"format": "pt"},
        "größe": entry("F32", shape=[], offsets=[0, 4]),
        "empty": entry("F32", shape=[0, 1 << 40], offsets=[4, 4]),
        "a..b/c": entry("F4", shape=[1, 2], offsets=[4, 5]),
    }
    text = json.dumps(header).encode() + b"   "
    file.write_bytes(raw_file(text, b"12345"))
    read = read_header(file)
    assert dict(read.metadata) == {"format": "pt"}
    at = 8 + len(text)
    assert {name: (info.shape, info.start - at, info.end - at) for name, info in read.tensors.items()} == {
        "größe": ((), 0, 4),
        "empty": ((0, 1 << 40), 4, 4),
        "a..b/c": ((1, 2), 4, 5),
    }
    assert len(safetensors.deserialize(file.read_bytes())) == 3  # type: ignore[no-untyped-call]
    file.write_bytes(raw_file(b"{}"))
    assert not read_header(file).tensors


# ---------------------------------------------------------------------------------------------------------------------
# Differential fuzz: what this reader accepts, the library accepts and understands in the same way.


def accepted_by_library(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    try:
        tensors = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return None
    return {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in tensors}


def accepted_here(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as stream:
        stream.write(content)
        stream.flush()
        try:
            tensors = read_header(Path(stream.name)).tensors
        except BadInput:
            return None
    return {name: (info.dtype, info.shape, content[info.start : info.end]) for name, info in tensors.items()}


small = st.integers(0, 5)
dtypes = st.sampled_from([*DTYPES, "F8_E4M3FNUZ", "F6_E2M3", "C64", "f32", ""])
plain = st.sampled_from(["a", "b", "norm.weight", "layers.0.w", "é"])
names = (
    plain
    | plain
    | plain
    | st.text(max_size=6)
    | st.sampled_from(["a", "layers.0.w", "..", "/a", "a/../b", "__metadata__", "\x7f", "é"])
)
odd = (
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers(-(2**70), 2**70)
    | st.text(max_size=4)
    | st.lists(st.integers(-1, 9), max_size=4)
)


@st.composite
def valid_headers(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A header that the format allows, and its data."""
    header: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(names.filter(lambda name: name != "__metadata__"), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(list(DTYPES)))
        shape = draw(st.lists(small, max_size=3))
        if dtype == "F4":
            shape = [*shape, 2 * draw(small)]
        bits = DTYPES[dtype].bits
        for extent in shape:
            bits *= extent
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + bits // 8]}
        position += bits // 8
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
    return header, draw(st.binary(min_size=position, max_size=position))


@st.composite
def broken_files(draw: st.DrawFn) -> bytes:
    """A valid file with up to three faults: a field replaced, a size changed, bytes flipped, removed or added."""
    header, data = draw(valid_headers())
    header = copy.deepcopy(header)
    for _ in range(draw(st.integers(0, 2))):
        if not header:
            break
        name = draw(st.sampled_from(list(header)))
        if isinstance(header[name], dict) and header[name] and draw(st.integers(0, 4)):
            field = draw(st.sampled_from(list(header[name])))
            header[name][field] = draw(
                odd
                | dtypes
                | st.lists(st.integers(0, 40), max_size=3)
                | st.just([0, 2**62, 2**62])
                | st.just([2**32, 2**32])
            )
        else:
            header[name] = draw(odd | st.dictionaries(st.text(max_size=2), odd, max_size=2))
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    text += b" " * draw(st.integers(0, 3))
    content = bytearray(raw_file(text, data))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(content) - 1))
        match draw(st.integers(0, 3)):
            case 0:
                content[at] = draw(st.integers(0, 255) | st.sampled_from(list(b'{}[]",:0123456789-.e \n\\')))
            case 1:
                del content[at : at + draw(st.integers(1, 3))]
            case 2:
                content[at:at] = draw(st.binary(min_size=1, max_size=2))
            case _:
                text = bytes(content[8:])
                content[:8] = len(text[: draw(st.integers(0, len(text)))]).to_bytes(8, "little")
        if not content:
            break
    return bytes(content)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(broken_files())
@example(VALID)
def test_never_accepts_what_the_library_refuses(content: bytes) -> None:
    here = accepted_here(content)
    assert here is None or here == accepted_by_library(content)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(valid_headers())
def test_accepts_what_the_format_allows(built: tuple[dict[str, Any], bytes]) -> None:
    """Everything the library accepts, except names that this reader refuses on purpose."""
    header, data = built
    content = raw_file(header, data)
    library = accepted_by_library(content)
    assert library is not None
    refused = any(not name.isprintable() or not name or name[0] in "/\\" or ".." in name for name in header)
    assert refused or accepted_here(content) == library


@pytest.mark.parametrize("case", BAD_FILES)
def test_the_table_is_wider_than_the_library(case: str) -> None:
    """Which of the bad files the library would take: exactly the holes that are known and closed here."""
    known = {
        "F08 leading space",
        "H01 duplicate, same",
        "H01 duplicate, other dtype",
        "H10 empty name",
        "H10 NUL in the name",
        "H10 line end in the name",
        "H10 direction mark in the name",
        "H10 traversal",
        "H10 traversal, backslash",
        "H10 absolute",
        "H10 very long",
        "H13 odd rows of F4",
        "unknown field",
    }
    assert (accepted_by_library(BAD_FILES[case][0]) is not None) == (case in known)


def test_reads_what_torch_saves(tmp_path: Path) -> None:
    """Every dtype that torch can save is described as torch describes it."""
    spellings = {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "U16": torch.uint16,
        "I16": torch.int16,
        "U32": torch.uint32,
        "I32": torch.int32,
        "U64": torch.uint64,
        "I64": torch.int64,
        "F4": torch.float4_e2m1fn_x2,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F32": torch.float32,
        "F64": torch.float64,
    }
    assert spellings.keys() == DTYPES.keys()
    tensors = {
        name: torch.zeros(3, 4 * dtype.itemsize, dtype=torch.uint8).view(dtype) for name, dtype in spellings.items()
    }
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    read = read_header(tmp_path / "x.safetensors").tensors
    assert {name: info.dtype for name, info in read.items()} == {name: name for name in spellings}
    assert {name: info.shape for name, info in read.items()} == {
        name: (3, 8) if name == "F4" else (3, 4) for name in spellings
    }
