"""Writing safetensors files and the index of several: streamed, and complete or not there at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv4_convert.checkpoint.header import MAX_HEADER_BYTES, METADATA_KEY, check_name, stored_nbytes
from dsv4_convert.checkpoint.index import INDEX_NAME, is_shard_name
from dsv4_convert.files.writing import atomic_write, write_atomically

Chunk = bytes | bytearray | memoryview | np.ndarray
#: The bytes of one tensor: at once, in pieces, or made by a call at the moment they are needed.
Chunks = Chunk | Iterable[Chunk] | Callable[[], Chunk | Iterable[Chunk]]


class TensorEntry(NamedTuple):
    """One tensor to write; a plain tuple of the same four does too."""

    name: str
    #: safetensors spelling.
    dtype: str
    #: Elements per axis, as the header states them.
    shape: Sequence[int]
    chunks: Chunks


def write_safetensors(
    path: Path | str,
    entries: Iterable[TensorEntry | tuple[str, str, Sequence[int], Chunks]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one safetensors file, tensors in the order given, holding one chunk in memory at a time.

    The file appears under its name only when all of it is on disk; a file of that name is replaced then. The header is
    padded so that tensor data begins at a multiple of 8 bytes; for aligned tensors give the widest dtypes first.

    Raises:
        ValueError: a name, dtype or shape that the format does not allow, a name given twice, or chunks that do not add
            up to the tensor.
        ResourceError: the disk is full, or the folder cannot be written to.
    """
    path = Path(path)
    tensors = [TensorEntry(*entry) for entry in entries]
    sizes = [stored_nbytes(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
    header = _header(tensors, sizes, metadata or {})
    with atomic_write(path, nbytes=len(header) + sum(sizes)) as stream:
        stream.write(header)
        for tensor, size in zip(tensors, sizes, strict=True):
            written = 0
            for raw in _raw_chunks(tensor.chunks):
                written += len(raw)
                if written > size:
                    break
                stream.write(raw)
            if written != size:
                more = "or more " if written > size else ""
                raise ValueError(f"{tensor.name}: {size} bytes expected, {written} {more}given")


def write_index(folder: Path | str, weight_map: Mapping[str, str], total_size: int) -> Path:
    """Write ``model.safetensors.index.json``: tensor -> shard, and the bytes of all tensors. Returns its path.

    Raises:
        ValueError: a shard name that is not a plain file name.
        ResourceError: the disk is full, or the folder cannot be written to.
    """
    for shard in set(weight_map.values()):
        if not is_shard_name(shard):
            raise ValueError(f"{shard!r} is not a plain file name ending in .safetensors")
    content = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    text = f"{json.dumps(content, indent=2)}\n".encode()
    path = Path(folder) / INDEX_NAME
    write_atomically(path, text)
    return path


def _header(tensors: Sequence[TensorEntry], sizes: Sequence[int], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header, padded with spaces so that the data begins at a multiple of 8."""
    fields: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    position = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        check_name(tensor.name)
        if tensor.name in fields or tensor.name == METADATA_KEY:
            raise ValueError(f"{tensor.name}: the name is given twice or reserved")
        offsets = [position, position + size]
        fields[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position += size
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"{len(tensors)} tensors need a header of {len(text):,} bytes; write several shards")
    return len(text).to_bytes(8, "little") + text


def _raw_chunks(chunks: Chunks) -> Iterator[memoryview]:
    """Any form of chunks as flat byte views."""
    given = chunks() if callable(chunks) else chunks
    for chunk in (given,) if isinstance(given, Chunk) else given:
        if isinstance(chunk, np.ndarray):
            # As uint8, because arrays of ml_dtypes have no buffer format of their own.
            yield np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
        else:
            yield memoryview(chunk).cast("B")
