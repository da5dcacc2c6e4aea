"""The header of a safetensors file, read strictly.

A safetensors file is an unsigned 64-bit little-endian length, a JSON header of that length and the tensor bytes:
https://github.com/huggingface/safetensors#format. This reader refuses everything that the safetensors library refuses.
It also refuses input that the library accepts although the format forbids it or readers disagree on it: duplicate keys,
a header that does not begin with ``{``, unknown fields, and tensor names that no model has (empty, control characters,
``..`` as a component, absolute).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dsv4_convert.checkpoint.dtypes import DTYPES
from dsv4_convert.errors import BadInput, listed
from dsv4_convert.files.reading import Stamp, foreign_content, read_start, stamp_of, stat_regular
from dsv4_convert.files.strict_json import parse_object, shown
from dsv4_convert.spec.coverage import Stored

#: The limit of the format; a header of V4-Pro's fullest shard has 0.4 MB.
MAX_HEADER_BYTES = 100_000_000
METADATA_KEY = "__metadata__"

#: The length before the header, and what of a file says whether it is safetensors at all.
LENGTH_BYTES = 8
HEAD_BYTES = 512
_MAX_NAME = 1000
#: Asked for at first of a file that is somewhere else. The header of V4-Pro's fullest shard has 0.4 MB.
_FIRST_BYTES = 512 << 10
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_AGAIN = "download the file again"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One tensor as its header describes it.

    Attributes:
        dtype: the safetensors spelling, a key of :data:`~dsv4_convert.checkpoint.dtypes.DTYPES`.
        shape: elements per axis; for ``F4`` single elements, not bytes.
        start: first byte of the tensor, counted from the start of ``file``.
        end: one past its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.end - self.start


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of one file of ``size`` bytes, and the state of the file; None for one that is not here yet."""

    file: Path
    size: int
    stamp: Stamp | None
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def stored_forms(tensors: Mapping[str, TensorInfo]) -> dict[str, Stored]:
    """Dtype and shape of every tensor by name: what the proof of coverage asks of a checkpoint."""
    return {name: Stored(info.dtype, info.shape) for name, info in tensors.items()}


def read_header(file: Path) -> Header:
    """Read and check the header of one safetensors file. No tensor byte is touched.

    Raises:
        BadInput: the path is not a regular file, the file is not safetensors, or its header contradicts itself or the
            file's size. Problems of single tensors are listed together.
    """
    status = stat_regular(file)
    length = header_length(file, read_start(file, HEAD_BYTES), status.st_size)
    text = read_start(file, LENGTH_BYTES + length)[LENGTH_BYTES:]
    if len(text) != length:
        raise BadInput(f"{file}: changed while it was read; wait until whatever writes it has finished")
    return parse_header(file, text, size=status.st_size, stamp=stamp_of(status))


def read_header_by_ranges(file: Path, size: int, read: Callable[[int, int], bytes]) -> Header:
    """The header of a file of ``size`` bytes that is somewhere else; ``read`` gives bytes ``start:stop`` of it.

    Raises:
        BadInput: as :func:`read_header`; or ``read`` gives less than there should be.
    """
    head = read(0, min(size, _FIRST_BYTES))
    end = LENGTH_BYTES + header_length(file, head[:HEAD_BYTES], size)
    if len(head) < end:
        head += read(len(head), end)
    if len(head) < end:
        raise BadInput(f"{file}: {len(head):,} bytes came of a header of {end:,}; try again later")
    return parse_header(file, head[LENGTH_BYTES:end], size=size, stamp=None)


def parse_header(file: Path, text: bytes, *, size: int, stamp: Stamp | None) -> Header:
    """Check the JSON text of a header. The file itself, of ``size`` bytes, need not be there.

    Raises:
        BadInput: as :func:`read_header`.
    """
    root = parse_object(text, where=f"{file} (header)", parse_int=_natural)
    metadata = root.pop(METADATA_KEY, {})
    problems = _metadata_problems(metadata)
    data_start = LENGTH_BYTES + len(text)
    tensors: dict[str, TensorInfo] = {}
    for name, entry in root.items():
        try:
            tensors[name] = _tensor(name, entry, file, data_start)
        except ValueError as error:
            problems.append(f"{shown(name)}: {error}")
    if problems:
        raise BadInput(f"{file}: the header is not valid; {_AGAIN}\n{listed(problems)}")
    _check_layout(file, tensors, data_start, size)
    return Header(file=file, size=size, stamp=stamp, tensors=tensors, metadata=metadata)


def check_name(name: str) -> None:
    """Refuse tensor names that could be misread further on, where they become paths and lines of text.

    Raises:
        ValueError: empty, longer than 1000 characters, with characters that do not print (control characters, line
            ends, lone surrogates, invisible marks), absolute, or with ``..`` as a component.
    """
    if not name or len(name) > _MAX_NAME:
        raise ValueError(f"a tensor name has 1 to {_MAX_NAME} characters, this one {len(name)}")
    if not name.isprintable():
        raise ValueError("the tensor name has characters that do not print")
    if name[0] in "/\\" or ".." in name.replace("\\", "/").split("/"):
        raise ValueError("the tensor name looks like a path that leaves its folder")


@lru_cache(maxsize=1024)  # a hundred thousand tensors have some dozens of shapes
def stored_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of that dtype and shape.

    Raises:
        ValueError: an unknown dtype, an extent beyond 63 bits, or ``F4`` with an odd last axis, which two elements per
            byte cannot hold.
    """
    stored = DTYPES.get(dtype)
    if stored is None:
        raise ValueError(f"dtype {shown(dtype)} is not supported; supported are {', '.join(DTYPES)}")
    # Zeros aside, so that (0, 2**62, 2**62) does not pass here and overflow in somebody else's product.
    if math.prod(extent for extent in shape if extent) * stored.bits >= 1 << 63:
        raise ValueError(f"shape {list(shape)} is larger than any file")
    if dtype == "F4" and (not shape or shape[-1] % 2):
        raise ValueError(f"F4 packs two elements per byte, so the last axis of shape {list(shape)} has to be even")
    return math.prod(shape) * stored.bits // 8


def header_length(file: Path, head: bytes, size: int) -> int:
    """Length of the JSON header in bytes, from the first :data:`HEAD_BYTES` of a file of ``size`` bytes.

    Raises:
        BadInput: not the start of a safetensors file of that size; says what it seems to be.
    """
    if size == 0:
        raise BadInput(f"{file}: empty; {_AGAIN}")
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    if size >= LENGTH_BYTES and 2 <= length <= min(MAX_HEADER_BYTES, size - LENGTH_BYTES) and head[8:9] == b"{":
        return length
    if (found := foreign_content(head)) is not None:
        raise BadInput(f"{file}: expected a safetensors file, found {found}")
    if size < LENGTH_BYTES:
        raise BadInput(f"{file}: {size} bytes, too short for a safetensors file; {_AGAIN}")
    if length > MAX_HEADER_BYTES:
        raise BadInput(f"{file}: not a safetensors file: a header of {length:,} bytes, at most 100 MB are allowed")
    if length > size - LENGTH_BYTES:
        raise BadInput(f"{file}: truncated: a header of {length:,} bytes, but the file has {size:,}; {_AGAIN}")
    raise BadInput(f"{file}: not a safetensors file: the header has to begin with '{{', found {head[8:9]!r}")


def _natural(digits: str) -> int:
    """An integer of the header. None may be negative, and ``-0`` is an integer to some parsers only."""
    if digits[0] == "-":
        raise ValueError(f"negative number {digits[:20]} in the header; the file is damaged, {_AGAIN}")
    return int(digits)


def _metadata_problems(metadata: Any) -> list[str]:
    if not isinstance(metadata, dict):
        return [f"{METADATA_KEY}: expected an object, found {type(metadata).__name__}"]
    problems = []
    for key, value in metadata.items():
        if not isinstance(value, str):
            problems.append(f"{METADATA_KEY}: {shown(key)} has to be a string, found {type(value).__name__}")
    return problems


def _tensor(name: str, entry: Any, file: Path, data_start: int) -> TensorInfo:
    """One entry of the header, as absolute offsets. Raises ValueError without the tensor's name."""
    check_name(name)
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"expected the fields data_offsets, dtype, shape; found {shown(str(found))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str:
        raise ValueError(f"dtype has to be a string, found {shown(repr(dtype))}")
    if type(shape) is not list or not all(type(extent) is int for extent in shape):  # bool is an int to isinstance
        raise ValueError(f"shape has to be a list of integers, found {shown(repr(shape))}")
    if type(offsets) is not list or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise ValueError(f"data_offsets has to be two integers, found {shown(repr(offsets))}")
    extents = tuple(shape)
    expected = stored_nbytes(dtype, extents)
    begin, end = offsets
    if end - begin != expected:
        raise ValueError(f"{dtype} {shape} takes {expected} bytes, but data_offsets {offsets} span {end - begin}")
    return TensorInfo(name=name, dtype=dtype, shape=extents, file=file, start=data_start + begin, end=data_start + end)


def _check_layout(file: Path, tensors: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    """Tensors follow each other without hole or overlap, and fill the file to its end."""
    problems = []
    position, before = data_start, "the header"
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.end)):
        if info.start != position:
            what = "overlaps" if info.start < position else "leaves a hole after"
            problems.append(f"{info.name}: {what} {before} (begins at byte {info.start}, expected {position})")
        position, before = max(position, info.end), info.name
    if problems:
        raise BadInput(f"{file}: the tensors do not fill the file one after the other; {_AGAIN}\n{listed(problems)}")
    if size < position:
        raise BadInput(f"{file}: truncated: the header describes {position:,} bytes, the file has {size:,}; {_AGAIN}")
    if size > position:
        raise BadInput(f"{file}: {size - position:,} bytes after the last tensor, expected none; {_AGAIN}")
