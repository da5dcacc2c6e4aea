"""Products of bfloat16 in float32, and of the matrices of a stack, against NumPy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jaxtyping import Array

from dsv4_convert.model.encoded import Member, product
from dsv4_convert.model.experts import CPU_TILES, packed
from dsv4_convert.model.ops import MATMUL, einsum_f32
from dsv4_convert.model.router import Routing

#: Axes of rows: one row, several, none, and rows of several prompts.
ROWS = ((1,), (7,), (0,), (1, 1), (2, 3))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_sums_are_float32(dtype: type) -> None:
    """A matrix, a matrix out of a stack, each matrix of a stack, and a product that is transposed at once."""
    rng = np.random.default_rng(1)
    stack = rng.normal(size=(2, 136, 48)).astype(dtype)
    given = [rng.normal(size=(*rows, 2, 136)).astype(dtype) for rows in ROWS]

    def multiply(given: list[Array], stack: Array, at: Array) -> list[list[Array]]:
        def of(x: Array) -> list[Array]:
            own = x[..., 1, :]
            turned = einsum_f32(MATMUL, jnp.swapaxes(own.T, 0, -1), stack[1]).T
            member = Member(stack, at).product(own, stack.dtype)
            return [einsum_f32(MATMUL, own, stack[1]), member, product(x, stack, stack.dtype), turned]

        return [of(x) for x in given]

    found = jax.jit(multiply)([jnp.asarray(x) for x in given], jnp.asarray(stack), jnp.int32(1))
    for rows, x, results in zip(ROWS, given, found, strict=True):
        each = np.einsum("...gi,gio->...go", x.astype(np.float64), stack.astype(np.float64))
        one = each[..., 1, :]
        turned = (np.swapaxes(x[..., 1, :].astype(np.float64).T, 0, -1) @ stack[1].astype(np.float64)).T
        for result, expected in zip(results, (one, one, each, turned), strict=True):
            assert result.dtype == jnp.float32
            assert result.shape == expected.shape, rows
            np.testing.assert_allclose(result, expected, rtol=0, atol=2e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the limit is that of XLA on CPU")
def test_no_stack_of_experts_is_widened() -> None:
    """XLA on CPU would hold all experts in float32, were they not multiplied in a branch."""
    shapes = ((24, 64, 96), (24, 96, 64), (24, 64, 96))
    stacks = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    x = jax.ShapeDtypeStruct((5, 64), jnp.bfloat16)
    routing = Routing(jax.ShapeDtypeStruct((5, 2), jnp.int32), jax.ShapeDtypeStruct((5, 2), jnp.float32))
    program = jax.jit(lambda *operands: packed(*operands, limit=1.0, tiles=CPU_TILES)).lower(x, routing, *stacks)
    memory = program.compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < sum(2 * stack.size for stack in stacks)
