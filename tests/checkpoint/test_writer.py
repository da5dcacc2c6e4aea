"""Writing safetensors files: read back by the safetensors library, torch and the reader."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_convert.checkpoint import TensorEntry, open_checkpoint, read_header, write_index, write_safetensors
from dsv4_convert.checkpoint.dtypes import DTYPES
from dsv4_convert.errors import ResourceError


@st.composite
def entries(draw: st.DrawFn) -> list[tuple[str, str, list[int], bytes]]:
    names = st.text(st.characters(categories=["L", "N"], include_characters=" ._-é\"'"), min_size=1, max_size=9)
    names = names.filter(lambda name: name not in ("..", "__metadata__"))
    drawn = []
    for name in draw(st.lists(names, max_size=5, unique=True)):
        dtype = draw(st.sampled_from(list(DTYPES)))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        shape = [*shape, 2 * draw(st.integers(0, 3))] if dtype == "F4" else shape
        size = int(np.prod(shape, dtype=int)) * DTYPES[dtype].bits // 8
        drawn.append((name, dtype, shape, draw(st.binary(min_size=size, max_size=size))))
    return drawn


@settings(max_examples=200, deadline=None)
@given(entries(), st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2), st.integers(1, 9))
def test_round_trip(drawn: list[tuple[str, str, list[int], bytes]], metadata: dict[str, str], step: int) -> None:
    """Whatever the chunks are cut into, library and reader give the same back, in the same order."""

    def pieces(content: bytes) -> Iterator[bytes]:
        for at in range(0, len(content), step):
            yield content[at : at + step]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_safetensors(path, [(n, d, s, partial(pieces, c)) for n, d, s, c in drawn], metadata=metadata)
        assert os.listdir(folder) == ["model.safetensors"]
        content = path.read_bytes()
        library = {name: (i["dtype"], i["shape"], bytes(i["data"])) for name, i in safetensors.deserialize(content)}  # type: ignore[no-untyped-call]
        assert library == {name: (dtype, shape, data) for name, dtype, shape, data in drawn}
        header = read_header(path)
        assert list(header.tensors) == [name for name, *_ in drawn]
        assert dict(header.metadata) == metadata
        assert min((info.start for info in header.tensors.values()), default=0) % 8 == 0
        with safetensors.safe_open(path, framework="pt") as opened:
            assert (opened.metadata() or {}) == metadata


def test_forms_of_chunks(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.bfloat16)
    raw = array.tobytes()
    write_safetensors(
        tmp_path / "model.safetensors",
        [
            TensorEntry("array", "BF16", (3, 4), array),
            TensorEntry("transposed", "BF16", (4, 3), lambda: array.T),
            TensorEntry("rows", "BF16", (3, 4), (row for row in array)),
            TensorEntry("strided", "BF16", (3, 4), (np.repeat(row, 2)[::2] for row in array)),
            TensorEntry("bytes", "BF16", (3, 4), raw),
            TensorEntry("call", "BF16", (3, 4), lambda: [bytearray(raw[:5]), memoryview(raw)[5:]]),
            TensorEntry("wide view", "BF16", (3, 4), np.frombuffer(raw, np.int64).data),
        ],
    )
    expected = torch.arange(12).reshape(3, 4).bfloat16()
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert torch.equal(loaded.pop("transposed"), expected.T)
    assert len(loaded) == 6
    assert all(torch.equal(tensor, expected) for tensor in loaded.values())


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (("a", "U8", (3,), b"ab"), "3 bytes expected, 2 given"),
        (("a", "U8", (3,), [b"ab", b"cd", b"ef"]), "3 bytes expected, 4 or more given"),
        (("a", "F7", (3,), b"abc"), "not supported"),
        (("a", "F4", (3,), b"ab"), "even"),
        (("", "U8", (3,), b"abc"), "1 to 1000"),
        (("../a", "U8", (3,), b"abc"), "path"),
        (("ok", "U8", (3,), b"abc"), "given twice"),
        (("__metadata__", "U8", (3,), b"abc"), "reserved"),
    ],
)
def test_wrong_entries_leave_no_file(tmp_path: Path, entry: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        write_safetensors(tmp_path / "x.safetensors", [("ok", "U8", (1,), b"x"), entry])
    assert not list(tmp_path.iterdir())


def test_a_failure_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, [("a", "U8", (1,), b"x")])
    before = path.read_bytes()

    def interrupted() -> Iterator[bytes]:
        yield b"1"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, [("a", "U8", (2,), interrupted)])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_and_missing_folder(tmp_path: Path) -> None:
    def full() -> Iterator[bytes]:
        yield b"1"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        ResourceError, match=r"x\.safetensors: cannot write: No space left.*bytes are needed, .* are free"
    ):
        write_safetensors(tmp_path / "x.safetensors", [("a", "U8", (2,), full)])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ResourceError, match="cannot write: No such file"):
        write_safetensors(tmp_path / "missing" / "x.safetensors", [])


def test_bounded_memory(tmp_path: Path) -> None:
    """600 MB written in pieces of 1 MB raise the peak by little."""
    script = """
import resource, sys
from dsv4_convert.checkpoint import write_safetensors
piece = bytes(1 << 20)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
write_safetensors(sys.argv[1], [("a", "U8", (600, 1 << 20), lambda: (piece for _ in range(600)))])
print((peak() - before) >> 10)
"""
    path = tmp_path / "x.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", script, path],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],  # where a process of its own finds the packages
    )
    assert int(done.stdout) < 20  # MiB
    assert read_header(path).tensors["a"].nbytes == 600 << 20
    path.unlink()


def test_index_and_shards_open_as_a_checkpoint(tmp_path: Path) -> None:
    weight_map = {"b": "model-2.safetensors", "a": "model-1.safetensors"}
    for name, shard in weight_map.items():
        write_safetensors(tmp_path / shard, [(name, "U8", (2,), name.encode() * 2)], metadata={"format": "pt"})
    path = write_index(tmp_path, weight_map, 4)
    assert json.loads(path.read_text()) == {"metadata": {"total_size": 4}, "weight_map": weight_map}
    (tmp_path / "config.json").write_text("{}")
    with open_checkpoint(tmp_path) as checkpoint:
        assert {name: bytes(checkpoint.read(name)) for name in checkpoint.tensors} == {"a": b"aa", "b": b"bb"}
    with pytest.raises(ValueError, match="plain file name"):
        write_index(tmp_path, {"a": "../x.safetensors"}, 0)
    assert path.exists()
