"""The kernel that multiplies with experts in codes, interpreted, against PyTorch's products of ml_dtypes' numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from dsv4_convert.model.encoded import Encoded
from dsv4_convert.model.experts import expert_path, grouped, packed
from dsv4_convert.model.grouped_codes import Tiles, ragged_dot_codes
from dsv4_convert.model.router import Routing

#: Form of the codes -> the block that shares a scale.
BLOCKS = {"fp4": (32, 1), "fp8": (128, 128), "base": (128, 128)}
#: Rows of each expert, rows in all (those beyond belong to nobody), inputs, outputs, and tiles.
CASES: dict[str, tuple[list[int], int, int, int, Tiles | None]] = {
    "one row each, and none": ([1, 0, 1, 0, 1], 3, 256, 40, None),
    "nobody's rows": ([0, 0, 0], 20, 256, 128, None),
    "tiles that straddle experts": ([30, 0, 1, 17, 20, 0], 80, 512, 384, Tiles(16, 128)),
    "a last tile of rows and outputs that is not whole": ([0, 40, 3], 43, 256, 300, Tiles(8, 256)),
    "an expert of many tiles": ([130, 2], 132, 128, 128, Tiles(16, 128)),
    "blocks that are not whole": ([3, 2], 5, 80, 40, None),
}


def _random(form: str, shape: tuple[int, int, int], dtype: Any = np.float32) -> tuple[Encoded, np.ndarray[Any, Any]]:
    """A stack in codes, and its numbers by ml_dtypes."""
    experts, inputs, outputs = shape
    block, rng = BLOCKS[form], np.random.default_rng(sum(shape))
    codes = rng.integers(0, 256, (experts, inputs // 2 if form == "fp4" else inputs, outputs), np.uint8)
    blocks = (experts, -(-inputs // block[0]), -(-outputs // block[1]))
    if form == "base":
        scales = factors = rng.uniform(0.01, 0.1, blocks).astype(np.float32)
    else:
        scales = rng.integers(122, 128, blocks, np.uint8)
        factors = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    if form == "fp4":
        nibbles = np.stack([codes & 15, codes >> 4], axis=2).reshape(shape)
        numbers = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    else:
        codes &= 0xBF  # small ones, and none that is no number
        numbers = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    numbers = numbers * factors.repeat(block[0], 1)[:, :inputs].repeat(block[1], 2)[..., :outputs]
    return Encoded(jnp.asarray(codes), jnp.asarray(scales), block, form == "fp4", np.dtype(dtype)), numbers


@pytest.mark.parametrize("form", BLOCKS)
@pytest.mark.parametrize("case", CASES)
def test_every_row_is_multiplied_with_its_expert(case: str, form: str) -> None:
    sizes, count, inputs, outputs, tiles = CASES[case]
    stack, numbers = _random(form, (len(sizes), inputs, outputs))
    rows = np.random.default_rng(1).normal(size=(count, inputs)).astype(np.float32)
    found = jax.jit(ragged_dot_codes, static_argnums=3)(rows, stack, jnp.asarray(sizes, jnp.int32), tiles)
    assert found.shape == (count, outputs)
    first = 0
    for expert, size in enumerate(sizes):
        here = slice(first, first := first + size)
        expected = (torch.from_numpy(rows[here]).double() @ torch.from_numpy(numbers[expert]).double()).numpy()
        np.testing.assert_allclose(found[here], expected, atol=2e-6 * np.abs(expected).max(initial=0), rtol=0)


def test_numbers_are_rounded_as_the_stack_says() -> None:
    """Scales that are no powers of two, in a bfloat16 stack: their products have more bits than it keeps."""
    stack, numbers = _random("base", (1, 128, 128), ml_dtypes.bfloat16)
    found = ragged_dot_codes(jnp.eye(128, dtype=jnp.float32), stack, jnp.asarray([128], jnp.int32))
    rounded = numbers[0].astype(ml_dtypes.bfloat16).astype(np.float32)
    assert (rounded != numbers[0]).mean() > 0.5
    np.testing.assert_array_equal(found, rounded)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_experts_are_those_of_the_tile_loop(dtype: Any) -> None:
    """Some choices are another device's, and two experts have no rows."""
    stacks = [_random("fp4", shape, dtype)[0] for shape in ((7, 64, 96), (7, 96, 64), (7, 64, 96))]
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(150, 64)), dtype)
    experts = jnp.asarray(np.stack([np.zeros(150), rng.integers(-2, 5, 150)], axis=1), jnp.int32)
    routing = Routing(experts, jnp.asarray(rng.uniform(0.1, 1, size=(150, 2)), jnp.float32))
    expected, found = (jax.jit(partial(way, limit=0.7))(x, routing, *stacks) for way in (packed, grouped))
    near = 1e-6 if dtype == jnp.float32 else 2**-7
    np.testing.assert_allclose(found, expected, atol=near * float(jnp.abs(expected).max()))


def test_codes_take_the_kernel_on_tpus_alone() -> None:
    paths = {name: [expert_path(name, encoded=encoded) for encoded in (False, True)] for name in ("cpu", "tpu", "cuda")}
    assert paths == {"cpu": ["packed"] * 2, "tpu": ["grouped"] * 2, "cuda": ["grouped", "packed"]}
