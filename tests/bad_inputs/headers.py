"""Headers that contradict themselves or their file, and names that mean something to a file system."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from .case import READERS, Case, Place, accepted, refused
from .checks import equals_healthy
from .edit import Tensor, in_header, in_tensors, in_text

_NAME = "layers.0.attn.wq_a.weight"
_INVALID = ("{shard}: the header is not valid", "download the file again")
_LAYOUT = ("{shard}: the tensors do not fill the file one after the other", "download the file again")


def _entry(**changes: Any) -> Callable[[Place], None]:
    """Changes fields of one tensor's entry."""
    return in_header(lambda header: header[_NAME].update(changes))


def _shifted(begin: int, end: int) -> Callable[[Place], None]:
    """Moves the ends of the first tensor's offsets, and its shape with them."""

    def change(header: dict[str, Any]) -> None:
        entry = min(header.values(), key=lambda entry: entry["data_offsets"])
        first, last = entry["data_offsets"]
        entry["data_offsets"] = [first + begin, last + end]
        entry["dtype"], entry["shape"] = "U8", [last + end - first - begin]

    return in_header(change)


def _twice(entry: bytes) -> Callable[[Place], None]:
    """The key of a tensor once more, at the end."""
    return in_text(lambda text: text[: text.rindex(b"}")] + b', "' + _NAME.encode() + b'": ' + entry + b"}")


def _renamed(name: str) -> Callable[[Place], None]:
    """Another name for a tensor, in shard and index."""

    def change(tensors: dict[str, Tensor]) -> None:
        items = [(name if key == _NAME else key, tensor) for key, tensor in tensors.items()]
        tensors.clear()
        tensors.update(items)

    return in_tensors(change)


def _added(name: str, tensor: Tensor) -> Callable[[Place], None]:
    return in_tensors(lambda tensors: tensors.update({name: tensor}))


def _second_like(place: Place) -> bytes:
    return b""


def _same_again(text: bytes) -> bytes:
    entry = json.dumps(json.loads(text)[_NAME]).encode()
    return text[: text.rindex(b"}")] + b', "' + _NAME.encode() + b'": ' + entry + b"}"


def _odd_f4(header: dict[str, Any]) -> None:
    begin, end = header[_NAME]["data_offsets"]
    header[_NAME] |= {"dtype": "F4", "shape": [1, 2 * (end - begin) - 1]}


HEADERS: tuple[Case, ...] = (
    refused(
        "H01",
        "the same key twice",
        f"{{shard}} (header): the key '{_NAME}' appears twice",
        "expected once",
        "download the file again",
        edit=in_text(_same_again),
        by=READERS,
    ),
    refused(
        "H01",
        "the same key with another dtype",
        f"the key '{_NAME}' appears twice",
        edit=_twice(b'{"dtype": "I8", "shape": [512], "data_offsets": [0, 512]}'),
    ),
    refused("H02", "tensors that overlap", *_LAYOUT, "overlaps", edit=_shifted(0, 1), by=READERS),
    refused(
        "H03", "a hole between tensors", *_LAYOUT, "leaves a hole after the header (begins at byte", edit=_shifted(1, 0)
    ),
    refused(
        "H04",
        "a negative extent",
        "{shard}",
        "negative number -16",
        "download the file again",
        edit=_entry(shape=[-16, 32]),
    ),
    refused(
        "H04",
        "a negative offset",
        "{shard}",
        "negative number -512",
        "download the file again",
        edit=_entry(data_offsets=[-512, 0]),
    ),
    refused(
        "H05",
        "an offset past the end of the file",
        "{shard}",
        "leaves a hole after",
        edit=_entry(data_offsets=[10**9, 10**9 + 512]),
    ),
    refused(
        "H06",
        "a tensor that ends before it begins",
        *_INVALID,
        _NAME,
        "takes 512 bytes, but data_offsets [512, 0] span -512",
        edit=_entry(data_offsets=[512, 0]),
    ),
    refused(
        "H07",
        "shape and offsets that differ",
        *_INVALID,
        _NAME,
        "F8_E4M3 [16, 33] takes 528 bytes, but data_offsets",
        edit=_entry(shape=[16, 33]),
        by=READERS,
    ),
    refused(
        "H08",
        "a shape whose product overflows 64 bits",
        *_INVALID,
        _NAME,
        "is larger than any file",
        edit=_entry(shape=[2**40, 2**40]),
    ),
    refused(
        "H08",
        "an overflow hidden behind a zero",
        *_INVALID,
        _NAME,
        "is larger than any file",
        edit=_entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]),
    ),
    refused(
        "H08",
        "an integer of five thousand digits",
        "{shard}",
        edit=in_text(lambda text: text.replace(b"[16,32]", b"[16," + b"9" * 5000 + b"]", 1)),
    ),
    refused(
        "H09",
        "an unknown dtype",
        *_INVALID,
        _NAME,
        "dtype 'F7_E9M9' is not supported; supported are",
        edit=_entry(dtype="F7_E9M9"),
        by=READERS,
    ),
    refused("H10", "an empty name", *_INVALID, "'': a tensor name has 1 to 1000 characters", edit=_renamed("")),
    refused(
        "H10",
        "a NUL in a name",
        *_INVALID,
        r"'layers.0\x00.weight': the tensor name has characters that do not print",
        edit=_renamed("layers.0\0.weight"),
    ),
    refused(
        "H10",
        "a name that leaves its folder",
        *_INVALID,
        "'../../etc/passwd': the tensor name looks like a path",
        edit=_renamed("../../etc/passwd"),
        by=READERS,
    ),
    refused(
        "H10",
        "an absolute name",
        *_INVALID,
        "'/etc/passwd': the tensor name looks like a path",
        edit=_renamed("/etc/passwd"),
    ),
    refused(
        "H10",
        "a line end in a name",
        *_INVALID,
        r"'a\nerror: b': the tensor name has characters that do not print",
        edit=_renamed("a\nerror: b"),
    ),
    refused(
        "H10",
        "a name of 5,000 characters",
        *_INVALID,
        "a tensor name has 1 to 1000 characters, this one 5000",
        edit=_renamed("a" * 5000),
    ),
    refused(
        "H10",
        "a name in another Unicode normal form",
        "layers.0.attn.wq_é.weight: unknown tensor F8_E4M3 [16, 32]",
        f"{_NAME}: missing",
        edit=_renamed("layers.0.attn.wq_é.weight"),
    ),
    refused(
        "H10",
        "a name in other case",
        "Layers.0.attn.wq_a.weight: unknown tensor F8_E4M3 [16, 32]",
        f"{_NAME}: missing",
        edit=_renamed("Layers.0.attn.wq_a.weight"),
    ),
    refused(
        "H10",
        "two names that differ in case alone",
        "layers.0.attn.WQ_A.weight: unknown tensor",
        "Compare with the repository's file list",
        edit=_added("layers.0.attn.WQ_A.weight", Tensor("U8", [4], b"1234")),
    ),
    refused(
        "H10",
        "a lone surrogate in a name",
        "{shard} (header): not valid Unicode: half of a surrogate pair",
        "download it again",
        edit=in_text(lambda text: text.replace(b'"layers.0.attn.wq_a.weight"', b'"layers.0.\\ud800"')),
    ),
    refused(
        "H11",
        "a weight of no elements",
        f"{_NAME}: expected shape [16, 32], found F8_E4M3 [0, 32]",
        edit=in_tensors(lambda tensors: tensors.update({_NAME: Tensor("F8_E4M3", [0, 32], b"")})),
    ),
    refused(
        "H12",
        "a scalar where a vector is expected",
        "layers.0.hc_attn_scale: expected shape [3], found F32 []",
        edit=in_tensors(lambda tensors: tensors.update({"layers.0.hc_attn_scale": Tensor("F32", [], b"1234")})),
    ),
    refused(
        "H13",
        "an odd number of packed FP4 elements",
        *_INVALID,
        _NAME,
        "F4 packs two elements per byte",
        edit=in_header(_odd_f4),
    ),
    refused(
        "H14",
        "a fraction as extent",
        *_INVALID,
        _NAME,
        "shape has to be a list of integers, found '[16.0, 32]'",
        edit=_entry(shape=[16.0, 32]),
    ),
    refused(
        "H14",
        "a truth value as extent",
        *_INVALID,
        _NAME,
        "shape has to be a list of integers, found '[True, 512]'",
        edit=_entry(shape=[True, 512]),
    ),
    refused("H14", "a number as dtype", *_INVALID, _NAME, "dtype has to be a string", edit=_entry(dtype=8)),
    refused(
        "H14",
        "a field that the format does not have",
        *_INVALID,
        _NAME,
        "expected the fields data_offsets, dtype, shape",
        edit=_entry(strides=[1, 2]),
    ),
    refused(
        "H15",
        "metadata that is no string",
        *_INVALID,
        "__metadata__: 'step' has to be a string, found int",
        edit=in_header(lambda header: header.update({"__metadata__": {"step": 1}})),
    ),
    refused(
        "H15",
        "metadata that is a list",
        *_INVALID,
        "__metadata__",
        edit=in_header(lambda header: header.update({"__metadata__": ["pt"]})),
    ),
    accepted(
        "H15",
        "metadata of strings",
        edit=in_header(lambda header: header.update({"__metadata__": {"format": "pt", "note": "é"}})),
        after=equals_healthy,
    ),
    refused(
        "H16",
        "a big-endian length",
        "{shard}",
        "at most 100 MB are allowed",
        edit=lambda place: place.shard.write_bytes(place.shard.read_bytes()[:8][::-1] + place.shard.read_bytes()[8:]),
    ),
    accepted(
        "H16",
        "tensors that no boundary aligns",
        edit=in_text(lambda text: text.rstrip() + b" " * (8 - len(text.rstrip()) % 8 + 1)),
        after=equals_healthy,
    ),
)
