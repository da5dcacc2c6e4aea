"""The kernel that multiplies with experts in codes through TPU compilers, at the releases' widths."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv4_convert.aot import Slice
from dsv4_convert.model.encoded import empty
from dsv4_convert.model.grouped_codes import ragged_dot_codes

EXPERTS = 8
#: The first matrix of V4-Flash's and V4-Pro's experts; the last one has fewer inputs, so it takes less room.
WIDTHS = [(4096, 2048), (7168, 3072)]


@pytest.mark.tpu
@pytest.mark.parametrize(("form", "dtype"), [("fp4", "bfloat16"), ("base", "float32")])
@pytest.mark.parametrize("where", ["v5p-8", "v6e-4"])
@pytest.mark.parametrize(("inputs", "outputs"), WIDTHS)
def test_it_compiles_and_decodes_nothing_outside_the_core(
    inputs: int, outputs: int, where: str, form: str, dtype: str
) -> None:
    mesh = Mesh(np.array(Slice.parse(where).devices()[:1]), ("chip",))

    def on(part: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def operands() -> Any:
        packed = form == "fp4"
        block = (32, 1) if packed else (128, 128)
        options: dict[str, Any] = {"packed": packed, "float_scales": not packed, "block": block, "dtype": dtype}
        stack = empty((EXPERTS, inputs, outputs), **options)
        return jnp.zeros((768, inputs), dtype), stack, jnp.zeros(EXPERTS, jnp.int32)

    given = jax.tree.map(on, jax.eval_shape(operands))
    compiled = jax.jit(ragged_dot_codes).trace(*given).lower(lowering_platforms=("tpu",)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    # One decoded matrix is larger, and so are the scales of a Base release for every output than those of a block.
    assert memory.temp_size_in_bytes < inputs * outputs * jnp.dtype(dtype).itemsize
