"""Run by test_engram.py on eight simulated devices: rows of an n-gram table that the devices share.

Compares every mesh with NumPy, then plants every fault of :data:`FAULTS`, each of which must change the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dsv4_convert.model import axes
from dsv4_convert.model.encoded import Encoded, on_mesh
from dsv4_convert.model.mesh import make_mesh, parse_mesh
from dsv4_convert.model.v41 import engram

MESHES = ("fsdp=2,expert=2,tensor=2", "data=2,expert=2,sequence=2", "fsdp=8", "tensor=8")
#: No mesh divides the rows, and on eight devices one has nothing but padding.
ROWS, WIDTH = 41, 64


def _as_on_the_next_device(table: jax.Array, index: jax.Array, axis: str) -> jax.Array:
    return axes.own_rows(table, index - table.shape[0], axis)


def _counted_without_padding(table: jax.Array, index: jax.Array, axis: str) -> jax.Array:
    return axes.own_rows(table, index + (table.shape[0] - ROWS // 8) * axes.axis_index(axis), axis)


def _the_padded_row(table: jax.Array, index: jax.Array, axis: str) -> jax.Array:
    return axes.own_rows(table, jnp.where(index == ROWS - 1, ROWS, index), axis)


def _own_part(part: jax.Array, axis: str) -> jax.Array:
    """What this device found for its own prompts."""
    prompts = len(part) // jax.lax.axis_size(axes._of_prompts(axis))
    return jax.lax.dynamic_slice_in_dim(part, jax.lax.axis_index(axes._of_prompts(axis)) * prompts, prompts)


def _of_the_next_prompts(part: jax.Array, axis: str) -> jax.Array:
    prompts = len(part) // jax.lax.axis_size(axes._of_prompts(axis))
    return axes.sum_to_prompts(jnp.roll(part, prompts, axis=0), axis)


#: Fault -> the function of the engram that it replaces, and by what.
FAULTS: Mapping[str, tuple[str, Callable[..., jax.Array]]] = {
    "a part begins where the next one does": ("own_rows", _as_on_the_next_device),
    "parts begin as if there were no padding": ("own_rows", _counted_without_padding),
    "a padded row is read": ("own_rows", _the_padded_row),
    "the sum is missing": ("sum_to_prompts", _own_part),
    "the sum is over the prompts' devices twice": (
        "sum_to_prompts",
        lambda part, axis: axes.psum(axes.sum_to_prompts(part, axis), axis),
    ),
    "each device gets another one's prompts": ("sum_to_prompts", _of_the_next_prompts),
}


def main() -> None:
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(1, 120, (ROWS, WIDTH), np.uint8), rng.integers(120, 130, (ROWS, 2), np.uint8)
    of_rows = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32).repeat(32, axis=1)
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * of_rows
    index = rng.integers(0, ROWS, (8, 6, 3)).astype(np.int32)
    index[0, 0] = 0, ROWS - 1, ROWS - 1
    tables = (values, Encoded(codes, scales, (1, 32), False, np.dtype(np.float32)))

    def agrees(table: Any) -> bool:
        found = jax.jit(lambda table, index: engram.rows_of(table, index))(table, index)
        return np.array_equal(found, values[index])

    assert all(map(agrees, (jax.tree.map(jnp.asarray, table) for table in tables)))
    for described in MESHES:
        mesh = make_mesh(parse_mesh(described), jax.devices())
        with jax.set_mesh(mesh):
            placed = [laid_over(table, mesh) for table in tables]
            # In chunks of two tokens, the last padded, and all at once.
            for at_once in (2 * index[:, 0].size * WIDTH, engram._AT_ONCE):
                with patch.object(engram, "_AT_ONCE", at_once):
                    assert all(map(agrees, placed)), (described, at_once)
            if described == MESHES[0]:
                for fault, (function, planted) in FAULTS.items():
                    with patch.object(engram, function, planted):
                        assert not any(map(agrees, placed)), fault
    print(f"tables agree on {len(MESHES)} meshes, {len(FAULTS)} faults found")


def laid_over(table: Any, mesh: jax.sharding.Mesh) -> Any:
    """A table on a mesh, with rows of NaN for padding."""
    nan = {np.dtype(np.float32): np.nan, np.dtype(np.uint8): 255}

    def padded(part: Any, on: Any) -> jax.Array:
        more = ((0, on.shape[0] - ROWS), (0, 0))
        return jax.device_put(np.pad(part, more, constant_values=nan[part.dtype]), on.sharding)

    return jax.tree.map(padded, table, on_mesh(table, axes.named("ngram entry"), mesh, what="table"))


if __name__ == "__main__":
    main()
