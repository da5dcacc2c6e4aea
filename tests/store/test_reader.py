"""Reading parts, refusing what differs, and finding every flipped bit."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.store import ArrayLayout, Store, open_store, verify
from dsv4_convert.store.layout import MANIFEST_FILE

from .writing import FilledLeaf, write_leaves

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["none", "zstd"])
def checkpoint(request, tmp_path: Path, arrays, make_leaves) -> Path:
    write_leaves(
        tmp_path / "checkpoint",
        make_leaves(arrays),
        compression=request.param,
        metadata={"revision": "abc"},
        files={"config.json": b'{"model_type": "x"}'},
    )
    return tmp_path / "checkpoint"


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, np.ndarray]]:
    """The same array in row chunks, in chunks that split every axis, and compressed."""
    array = np.arange(11 * 4 * 6, dtype=np.int32).reshape(11, 4, 6)
    arrays = {"rows": array, "blocks": array, "whole": array, "vector": array[:, 0, 0].copy()}
    chunk_shapes = {"rows": (3, 4, 6), "blocks": (4, 3, 5), "whole": (11, 4, 6), "vector": (4,)}
    leaves = []
    for path, chunk_shape in chunk_shapes.items():
        whole = arrays[path]
        layout = ArrayLayout(shape=whole.shape, dtype=whole.dtype, chunk_shape=chunk_shape)
        leaves.append(
            FilledLeaf(
                path=path,
                shape=whole.shape,
                dtype=whole.dtype,
                chunk_shape=chunk_shape,
                chunks=lambda index, layout=layout, whole=whole: np.ascontiguousarray(
                    whole[layout.chunk_region(index)]
                ),
            )
        )
    destination = tmp_path_factory.mktemp("grids") / "checkpoint"
    write_leaves(destination, leaves)
    return open_store(destination), arrays


@pytest.mark.parametrize("path", ["rows", "blocks", "whole", "vector"])
def test_slices_are_those_of_numpy(grids, path: str) -> None:
    store, arrays = grids
    bounds = (None, -12, -11, -5, -1, 0, 2, 3, 4, 9, 11, 13)
    for part in (slice(start, stop) for start in bounds for stop in bounds):
        np.testing.assert_array_equal(store.read(path, part), arrays[path][part], strict=True)
    for step in (-1, 2):
        with pytest.raises(ValueError, match="step 1"):
            store.read(path, slice(None, None, step))


@pytest.mark.parametrize("path", ["rows", "blocks", "whole", "vector"])
def test_entries_are_those_of_numpy(grids, path: str) -> None:
    store, arrays = grids
    for index in range(-11, 11):
        np.testing.assert_array_equal(store.read(path, index), arrays[path][index, ...], strict=True)
    for index in (-12, 11):
        with pytest.raises(IndexError, match=f"index {index} is outside its 11 rows"):
            store.read(path, index)


def test_what_is_read_is_what_is_asked_for(grids, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every region of every way to cut an array: its numbers, and not a byte more read than it has."""
    from dsv4_convert.store.arrays import StoredArray

    read: list[int] = []
    read_bytes = StoredArray._read_bytes

    def noted(self, index, runs):
        runs = list(runs)
        read.extend(len(into) for into, _ in runs)
        read_bytes(self, index, runs)

    monkeypatch.setattr(StoredArray, "_read_bytes", noted)
    store, arrays = grids
    for path in ("rows", "blocks", "whole", "vector"):
        array = arrays[path]
        cuts = [[slice(a, b) for a in (0, 1, size // 2) for b in (size // 2, size - 1, size)] for size in array.shape]
        for region in itertools.product(*cuts):
            read.clear()
            np.testing.assert_array_equal(store.read_region(path, region), array[region], strict=True)
            assert sum(read) == array[region].nbytes
    read.clear()
    store.read("rows", slice(2, 5))
    assert read == [4 * 6 * 4, 2 * 4 * 6 * 4], "rows that follow each other are one run"
    with pytest.raises(ValueError, match="step 1"):
        store.read_region("vector", (slice(None, None, 2),))


def test_everything_comes_back(checkpoint: Path, arrays) -> None:
    store = open_store(checkpoint)
    assert store.paths == tuple(sorted(arrays))
    assert store.metadata == {"revision": "abc"}
    assert json.loads(store.read_file("config.json")) == {"model_type": "x"}
    assert verify(store) == []
    for path, array in arrays.items():
        read = store.read(path)
        assert (read.shape, read.dtype, read.tobytes()) == (array.shape, array.dtype, array.tobytes())
        layout = store.leaf(path)
        assert (layout.shape, layout.dtype) == (array.shape, array.dtype)
    tree = store.read_tree()
    assert sorted(tree) == ["empty", "hc_head_scale", "layers"]
    assert tree["layers"]["3"]["attn"]["wq_a"]["scale"].tobytes() == arrays["layers.3.attn.wq_a.scale"].tobytes()
    below = store.read_tree("layers.3.attn")
    assert sorted(below["wq_a"]) == ["scale", "weight"]
    np.testing.assert_array_equal(
        store.read("layers.3.ffn.experts.w1", 4).view(np.uint16), arrays["layers.3.ffn.experts.w1"][4].view(np.uint16)
    )


def test_what_is_not_there_is_said(checkpoint: Path, tmp_path: Path) -> None:
    store = open_store(checkpoint)
    for read in (store.read, store.leaf):
        with pytest.raises(UsageError, match=r"has no leaf 'layers\.3'"):
            read("layers.3")
    with pytest.raises(UsageError, match=r"no leaf below 'layers\.3\.attn\.wq'"):
        store.read_tree("layers.3.attn.wq")
    with pytest.raises(UsageError, match=r"no file 'x'; it has .*config\.json"):
        store.read_file("x")
    with pytest.raises(IndexError, match="scalar"):
        store.read("hc_head_scale", 0)
    with pytest.raises(BadInput, match="no such folder"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=f"no {MANIFEST_FILE} in it"):
        open_store(tmp_path)


def test_every_file_is_covered_by_verification(checkpoint: Path) -> None:
    """One random bit in each file; the manifest's own bits make opening fail."""
    store = open_store(checkpoint)
    files = [file for file in checkpoint.rglob("*") if file.is_file() and file.stat().st_size]
    assert len(files) > 30
    rng = random.Random(5)
    for file in files:
        whole = file.read_bytes()
        damaged = bytearray(whole)
        position = rng.randrange(8 * len(whole))
        if file.name == MANIFEST_FILE:
            position %= 8 * (len(whole) - 1)  # not the line feed at the end
        damaged[position // 8] ^= 1 << position % 8
        file.write_bytes(damaged)
        if file.name == MANIFEST_FILE:
            with pytest.raises(BadInput):
                open_store(checkpoint)
        else:
            problems = verify(store)
            assert len(problems) == 1, (file, position, problems)
            assert str(file if file.parent == checkpoint else file.parent) in problems[0]
        file.write_bytes(whole)
    assert verify(store) == []


@pytest.mark.parametrize("change", ["unlink", "truncate", "extend"])
def test_missing_and_wrong_sized_files_are_found(checkpoint: Path, change: str) -> None:
    store = open_store(checkpoint)
    for name in ("config.json", "layers.3.ffn.experts.w1/2.0.0", "hc_head_scale/.zarray"):
        file = checkpoint / name
        whole = file.read_bytes()
        if change == "unlink":
            file.unlink()
        else:
            file.write_bytes(whole[:-1] if change == "truncate" else whole + b"x")
        assert [problem for problem in verify(store) if str(checkpoint / name.split("/")[0]) in problem]
        file.write_bytes(whole)


def test_progress_of_verification(checkpoint: Path, arrays) -> None:
    calls: list[tuple[int, int, str]] = []
    verify(open_store(checkpoint), lambda *call: calls.append(call))
    nbytes = sum(array.nbytes for array in arrays.values())
    assert calls[-1][:2] == (nbytes, nbytes)
    assert [done for done, _, _ in calls] == sorted({done for done, _, _ in calls})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "<i2"}, "dtype '<i2' is not one of"),
        ({"dtype": "<f2"}, "stored as float16 .* but the manifest says bfloat16"),
        ({"shape": [3, 4, 3]}, r"stored as bfloat16 \(3, 4, 3\)"),
        ({"chunks": [2, 4, 3]}, r"in chunks of \(2, 4, 3\)"),
        ({"order": "F"}, "order is 'F'"),
        ({"filters": [{"id": "delta"}]}, "filters is"),
        ({"compressor": {"id": "blosc"}}, "compressor"),
    ],
)
def test_an_array_of_another_shape_or_dtype_is_not_returned(checkpoint: Path, change, message: str) -> None:
    """Plain Orbax restores the first five of these without a word."""
    file = checkpoint / "layers.3.ffn.experts.w1" / ".zarray"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    store = open_store(checkpoint)
    with pytest.raises(BadInput, match=message):
        store.read("layers.3.ffn.experts.w1", 0)
    assert len(verify(store)) == 1


def test_reading_imports_neither_jax_nor_orbax(checkpoint: Path) -> None:
    script = (
        "import sys\nfrom dsv4_convert.store import open_store, verify\n"
        "store = open_store(sys.argv[1])\nstore.read_tree()\nassert verify(store) == []\n"
        "print(sorted({'jax', 'orbax', 'torch'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(checkpoint)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"
