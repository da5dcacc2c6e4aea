"""Rows of an engram's table: decoded one by one, and looked up by devices that share the table."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_convert.errors import UsageError
from dsv4_convert.model.axes import named, padded, partition
from dsv4_convert.model.encoded import Encoded
from dsv4_convert.model.v41.engram import rows_of

from ..processes import end, start

DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_scales_of_their_own_are_decoded_one_by_one(dtype: np.dtype[Any]) -> None:
    """FP8 rows with a scale for every 32 channels, against ml_dtypes."""
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 120, (50, 64), np.uint8), rng.integers(110, 140, (50, 2), np.uint8)
    table = jax.tree.map(jnp.asarray, Encoded(codes, scales, (1, 32), False, dtype))
    index = rng.integers(0, 50, (2, 3, 4)).astype(np.int32)
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    expected = (values * scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64).repeat(32, axis=1)).astype(dtype)
    np.testing.assert_array_equal(jax.jit(rows_of)(table, index), expected[index])


def test_devices_look_up_each_others_rows() -> None:
    """In a process of its own, because the number of devices is fixed when JAX starts."""
    ended = end(start(["-m", "tests.model.sharded_tables"], devices=8), timeout=300)
    assert ended.code == 0, ended.err[-3000:]
    assert "tables agree on 4 meshes, 6 faults found" in ended.out


def test_only_the_rows_of_a_table_are_padded() -> None:
    """V4.1's table on 256 devices; any other axis that a mesh does not divide stays an error."""
    sizes = {"fsdp": 8, "expert": 32}
    rows = 384_006_168
    assert padded(named("ngram entry"), (rows, 256), sizes) == (384_006_400, 256)
    assert padded(named("ngram entry"), (rows, 256), {}) == (rows, 256)
    shape = padded(named("layer vocab width"), (3, 9, 5), sizes | {"tensor": 2})
    assert shape == (3, 9, 5)
    with pytest.raises(UsageError, match="its axis vocab has 9"):
        partition(named("layer vocab width"), shape, {"tensor": 2}, what="embed")
