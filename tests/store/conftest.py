"""Small trees of leaves that every test of the store writes and reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from dsv4_convert.store import ArrayLayout
from dsv4_convert.store.layout import DTYPES

from .writing import FilledLeaf

Arrays = dict[str, np.ndarray[Any, Any]]
MakeLeaves = Callable[[Mapping[str, np.ndarray[Any, Any]]], list[FilledLeaf]]


@pytest.fixture(scope="session")
def arrays() -> Arrays:
    """Random bytes (so NaNs and every code occur) in all dtypes, and the shapes that are easily got wrong."""
    rng = np.random.default_rng(4)

    def random(name: str, *shape: int) -> np.ndarray[Any, Any]:
        dtype = DTYPES[name]
        return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)

    tree = {f"layers.{layer}.all_dtypes.{name}": random(name, 7, 5) for layer, name in enumerate(DTYPES)}
    return {
        **tree,
        "layers.3.ffn.experts.w1": random("bfloat16", 6, 4, 3),
        "layers.3.attn.wq_a.weight": random("float8_e4m3fn", 16, 8),
        "layers.3.attn.wq_a.scale": random("float8_e8m0fnu", 2, 1),
        "hc_head_scale": random("float32"),
        "empty": random("float32", 0, 3),
    }


@pytest.fixture(scope="session")
def make_leaves() -> MakeLeaves:
    """Specs of a tree. Chunks: one entry of a stacked array, three rows (an uneven number) of the others."""
    chunk_shapes = {0: lambda _: (), 2: lambda shape: (3, shape[1]), 3: lambda shape: (1, *shape[1:])}

    def leaf(path: str, array: np.ndarray[Any, Any]) -> FilledLeaf:
        layout = ArrayLayout(shape=array.shape, dtype=array.dtype, chunk_shape=chunk_shapes[array.ndim](array.shape))
        return FilledLeaf(
            path=path,
            shape=layout.shape,
            dtype=layout.dtype,
            chunk_shape=layout.chunk_shape,
            chunks=lambda index: np.asarray(array[(*layout.chunk_region(index), ...)], order="C"),
            sources=(f"source.{path}",),
            rule="copy",
        )

    return lambda arrays: [leaf(path, array) for path, array in arrays.items()]
