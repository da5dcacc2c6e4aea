"""Chunk grids, names and digests."""

from __future__ import annotations

import hashlib
import math

import ml_dtypes
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from dsv4_convert.store.digests import digest_of_digests, is_digest
from dsv4_convert.store.layout import (
    DTYPES,
    ArrayLayout,
    chunk_digest,
    chunk_file,
    is_file_name,
    is_leaf_path,
    nested,
    path_problems,
    row_chunks,
)

BF16 = DTYPES["bfloat16"]
dimensions = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 7)), max_size=3)


@given(dimensions)
def test_chunks_cover_every_element_once(sizes: list[tuple[int, int]]) -> None:
    shape, chunk_shape = tuple(size for size, _ in sizes), tuple(chunk for _, chunk in sizes)
    layout = ArrayLayout(shape=shape, dtype=BF16, chunk_shape=chunk_shape)
    count = np.zeros(shape, int)
    indices = list(layout.chunk_indices())
    for index in indices:
        part = count[layout.chunk_region(index)]
        assert part.shape == layout.clipped_shape(index)
        count[layout.chunk_region(index)] += 1
    assert (count == 1).all()
    assert len(indices) == layout.chunk_count
    assert indices == sorted(indices)
    if shape:
        assert list(layout.chunks_of_region(tuple(map(slice, [0] * len(shape), shape)))) == indices


@given(st.integers(0, 5000), st.lists(st.integers(1, 40), max_size=2), st.integers(1, 4000))
def test_row_chunks_stay_below_the_limit_and_are_balanced(rows: int, tail: list[int], limit: int) -> None:
    chunk = row_chunks((rows, *tail), BF16, limit=limit)
    row_bytes = math.prod(tail) * BF16.itemsize
    assert chunk[1:] == tuple(tail)
    assert chunk[0] == 1 or chunk[0] * row_bytes <= limit
    fewest_parts = math.ceil(max(1, rows) / max(1, limit // row_bytes))
    assert math.ceil(max(1, rows) / chunk[0]) <= fewest_parts
    assert chunk[0] == math.ceil(max(1, rows) / fewest_parts)


def test_row_chunks_of_the_embedding_of_the_release_waste_nothing() -> None:
    assert row_chunks((129280, 4096), BF16) == (8080, 4096)
    assert row_chunks((), BF16) == ()


@pytest.mark.parametrize(
    ("shape", "dtype", "chunk_shape", "message"),
    [
        ((4, 4), BF16, (4,), "same rank"),
        ((4, 4), BF16, (4, 0), "sizes >= 1"),
        ((-1,), BF16, (1,), "negative"),
        ((4,), np.dtype(">f4"), (4,), "cannot be stored"),
        ((4,), np.dtype(np.float64), (4,), "cannot be stored"),
        ((4,), np.dtype(ml_dtypes.float8_e5m2), (4,), "cannot be stored"),
    ],
)
def test_impossible_layouts_are_refused(
    shape: tuple[int, ...], dtype: np.dtype, chunk_shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ArrayLayout(shape=shape, dtype=dtype, chunk_shape=chunk_shape)


def test_digests_are_what_the_documentation_says() -> None:
    array = np.arange(6, dtype="<i4").reshape(2, 3)
    contents = [bytes([value, 0, 0, 0, value + 1, 0, 0, 0, value + 2, 0, 0, 0]) for value in (0, 3)]
    for function, prefix, like in ((blake3, "blake3:", None), (hashlib.sha256, "", "0" * 64)):
        rows = [function(content) for content in contents]
        digests = [chunk_digest(array[row : row + 1], like=like) for row in range(2)]
        assert digests == [prefix + row.hexdigest() for row in rows]
        whole = prefix + function(rows[0].digest() + rows[1].digest()).hexdigest()
        assert digest_of_digests(digests) == digest_of_digests(digests, like=whole) == whole
        assert all(is_digest(digest) for digest in digests)
    assert digest_of_digests([]) == f"blake3:{blake3().hexdigest()}"
    assert digest_of_digests([], like="0" * 64) == hashlib.sha256().hexdigest()


@pytest.mark.parametrize(
    "text", ["", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "blake3:", "sha256:" + "0" * 64, "0" * 64 + "\n"]
)
def test_what_is_no_digest(text: str) -> None:
    assert not is_digest(text)


def test_chunk_files_are_named_as_zarr_does() -> None:
    assert chunk_file((3, 0, 12)) == "3.0.12"
    assert chunk_file(()) == "0"


@pytest.mark.parametrize("path", ["hc_head_fn", "layers.12.attn.wq_a", "layers.0.attn.wq_a.weight", "norm"])
def test_good_paths(path: str) -> None:
    assert is_leaf_path(path)


@pytest.mark.parametrize(
    "path", ["", ".", "..", "a..b", ".a", "a.", "a/b", "../a", "a b", "a\n", "é", "a\0", "a" * 201]
)
def test_bad_paths(path: str) -> None:
    assert not is_leaf_path(path)
    assert path_problems([path])


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "/etc/x", "a\0", "a\n"])
def test_bad_file_names(name: str) -> None:
    assert not is_file_name(name)


def test_all_problems_of_the_paths_are_reported() -> None:
    problems = path_problems(["a.b.c", "a.b", "x", "x", "a.b_c", "."])
    assert len(problems) == 3
    assert any("'x' occurs twice" in problem for problem in problems)
    assert any("'a.b.c' lies below 'a.b'" in problem for problem in problems)


def test_nested_splits_at_the_dots() -> None:
    assert nested({"a.b": 1, "a.c.0": 2, "d": 3}) == {"a": {"b": 1, "c": {"0": 2}}, "d": 3}
