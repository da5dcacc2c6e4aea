"""Weights that stay codes and scales: their decoding, the routed experts, how they lie on a mesh, and memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import PartitionSpec

from dsv4_convert.errors import UsageError
from dsv4_convert.formats import decode_fp4, decode_fp8
from dsv4_convert.golden.synthetic import tiny_config
from dsv4_convert.model import Cache, Model
from dsv4_convert.model.encoded import FEW_ROWS, Encoded, in_source_form, partitions, product
from dsv4_convert.model.experts import ACCELERATOR_TILES, CPU_TILES_ENCODED, packed
from dsv4_convert.model.router import Routing
from dsv4_convert.spec.config import Config

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), BFLOAT16]
#: All bytes, in as many rows; and with every byte as scale of a column.
EVERY = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 256))


def _decoded(weight: Encoded) -> np.ndarray[Any, Any]:
    return np.asarray(jax.jit(lambda weight: weight[...])(jax.tree.map(jnp.asarray, weight)))


def _bits(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bits of numbers, but for those of NaN."""
    return np.where(np.isnan(numbers), 0, numbers.view(f"u{numbers.dtype.itemsize}"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp4", [True, False])
def test_every_code_under_every_power_of_two(fp4: bool, dtype: np.dtype[Any]) -> None:
    """Against this project's decoder and against ml_dtypes, bit for bit; subnormal products become zeros."""
    block = (32 if fp4 else 128, 1)
    inputs = 512 if fp4 else 256
    scales = np.tile(np.arange(256, dtype=np.uint8), (inputs // block[0], 1))
    found = _decoded(Encoded(EVERY, scales, block, fp4, dtype))

    powers = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64).repeat(block[0], axis=0)
    if fp4:
        codes = np.stack([EVERY & 15, EVERY >> 4], axis=1).reshape(512, 256).view(ml_dtypes.float4_e2m1fn)
        other = decode_fp4(EVERY.T.copy(), scales.T.copy(), dtype=dtype, transpose=True)
    else:
        codes = EVERY.view(ml_dtypes.float8_e4m3fn)
        other = decode_fp8(EVERY.T.copy(), scales.T.copy(), dtype=dtype, block=block[::-1], transpose=True)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = codes.astype(np.float64) * powers
        expected = exact.astype(np.float32).astype(dtype)
    small = (np.abs(exact) < 2.0**-126) & (exact != 0)
    assert 0 < small.sum() < found.size / 100
    np.testing.assert_array_equal(_bits(found[~small]), _bits(expected[~small]))
    np.testing.assert_array_equal(_bits(found[~small]), _bits(other[~small]))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    assert set(np.abs(found[small].astype(np.float64))) <= {0.0, *np.abs(exact[small])}


@pytest.mark.parametrize("dtype", DTYPES)
def test_float_scales_are_multiplied_and_rounded_as_torch_does(dtype: np.dtype[Any]) -> None:
    scales = np.exp(np.random.default_rng(0).normal(size=(2, 256)) * 9).astype(np.float32)
    codes = torch.from_numpy(EVERY).view(torch.float8_e4m3fn).float()
    product = codes * torch.from_numpy(scales).repeat_interleave(128, dim=0)
    expected = product.to(torch.bfloat16 if dtype == BFLOAT16 else torch.float32).float().numpy()
    weight = jax.tree.map(jnp.asarray, Encoded(EVERY, scales, (128, 1), False, dtype))
    found = jax.jit(lambda weight: weight[...].astype(jnp.float32))(weight)
    np.testing.assert_array_equal(_bits(np.asarray(found)), _bits(expected))


def _random(shape: tuple[int, ...], form: str, rng: np.random.Generator, dtype: Any = np.float32) -> Encoded:
    """Numbers of a spread that keeps activations near 1."""
    block = (32, 1) if form == "fp4" else (128, 128)
    *stack, inputs, outputs = shape
    blocks = (*stack, -(-inputs // block[0]), -(-outputs // block[1]))
    if form == "fp4":
        codes, exponent = rng.integers(0, 256, (*stack, inputs // 2, outputs), dtype=np.uint8), -3
    else:
        codes, exponent = rng.integers(0, 120, shape, dtype=np.uint8) | rng.integers(0, 2, shape, np.uint8) << 7, -9
    scales = rng.integers(126 + exponent, 129 + exponent, blocks, dtype=np.uint8)
    if form == "base":
        scales = (scales.astype(np.float32) - 100) * np.float32(1.1 * 2.0**exponent / 20)
    return Encoded(jnp.asarray(codes), jnp.asarray(scales), block, form == "fp4", np.dtype(dtype))


@pytest.mark.parametrize("form", ["fp4", "fp8", "base"])
def test_one_of_a_stack_and_blocks_that_are_cut_off(form: str) -> None:
    weight = _random((3, 160, 200), form, np.random.default_rng(1))
    one, everything = (
        jax.jit(lambda weight, index: weight[index]),
        np.asarray(jax.jit(lambda weight: weight[...])(weight)),
    )
    assert weight.shape == (3, 160, 200) == everything.shape
    for index in range(3):
        codes, scales = (np.asarray(part)[index].T.copy() for part in (weight.codes, weight.scales))
        decode = decode_fp4 if form == "fp4" else decode_fp8
        expected = decode(codes, scales, dtype=np.float32, transpose=True)
        np.testing.assert_array_equal(one(weight, index), expected)
        np.testing.assert_array_equal(everything[index], expected)
    with pytest.raises(IndexError, match="one by one"):
        jax.tree.map(lambda part: part[0], weight)[1]


@pytest.mark.parametrize(("form", "rows"), [("fp4", 1), ("fp8", 3), ("base", FEW_ROWS), ("fp8", FEW_ROWS + 1)])
def test_products_with_codes(form: str, rows: int) -> None:
    """A matrix, and each of a stack with inputs of its own; a few rows are multiplied with the codes themselves."""
    rng = np.random.default_rng(3)
    weight = _random((2, 256, 384), form, rng)
    x = rng.normal(size=(rows, 2, 256)).astype(np.float32)
    numbers = np.asarray(weight[...], np.float64)
    multiplied = jax.jit(lambda x, w: product(x, w, jnp.float32))
    first = jax.tree.map(lambda part: part[0], weight)
    for found, expected in (
        (multiplied(x, weight), np.einsum("ngi,gio->ngo", x.astype(np.float64), numbers)),
        (multiplied(x[:, 0], first), x[:, 0].astype(np.float64) @ numbers[0]),
    ):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    decodes = multiplied.lower(x[:, 0], first).compile().memory_analysis().temp_size_in_bytes >= 4 * 256 * 384
    assert decodes == (rows > FEW_ROWS)


def test_a_product_with_codes_keeps_zeros_nan_and_the_smallest_scale() -> None:
    codes = np.zeros((128, 128), np.uint8)
    codes[0, 0], codes[0, 1], codes[0, 2] = 0x7F, 0x80, 0x38  # NaN, -0, 1
    for byte, last in ((127, 1.0), (0, 2.0**-127), (255, np.nan)):
        weight = Encoded(jnp.asarray(codes), jnp.full((1, 1), byte, jnp.uint8), (128, 128), False, np.dtype(np.float32))
        x = np.zeros((1, 128), np.float32)
        x[0, 0] = 2.0**100
        found = np.asarray(jax.jit(lambda x, w: product(x, w, jnp.float32))(x, weight))[0]
        assert np.isnan(found[0])
        np.testing.assert_array_equal(found[1:3], [np.nan if byte == 255 else 0, last * 2.0**100])


@pytest.mark.parametrize("form", ["fp4", "fp8", "base"])
def test_experts_from_codes_are_those_from_numbers(form: str) -> None:
    """In tiles of every size; two experts have no rows, one has one, one a few, one more than a large tile."""
    rng = np.random.default_rng(2)
    stacks = [_random(shape, form, rng) for shape in ((9, 64, 96), (9, 96, 64), (9, 64, 96))]
    x = jnp.asarray(rng.normal(size=(300, 64)), jnp.float32)
    experts = np.stack([np.zeros(300, np.int32), 1 + rng.integers(0, 4, 300, np.int32)], axis=1)
    experts[:6, 1] = [5, 6, 6, 6, 6, 6]
    routing = Routing(jnp.asarray(experts), jnp.asarray(rng.uniform(0.1, 1, size=(300, 2)), jnp.float32))
    expected = jax.jit(partial(packed, limit=0.7))(x, routing, *(stack[...] for stack in stacks))
    for tiles in (CPU_TILES_ENCODED, ACCELERATOR_TILES):
        found = jax.jit(partial(packed, limit=0.7, tiles=tiles))(x, routing, *stacks)
        np.testing.assert_allclose(found, expected, atol=1e-6 * float(jnp.abs(expected).max()))


def test_codes_and_scales_are_split_alike() -> None:
    weight = jax.eval_shape(lambda: _random((8, 256, 384), "fp8", np.random.default_rng(0)))
    axes = ("experts", "width", "inner")
    found = partitions(weight, axes, {"expert": 4, "fsdp": 2, "tensor": 3}, what="w1")
    assert found == Encoded(spec := PartitionSpec(("expert",), ("fsdp",), ("tensor",)), spec, *_rest(weight))
    # 384 is a multiple of 2, but three blocks of 128 are not.
    with pytest.raises(UsageError, match=r"w1: its axis inner has 384 in blocks of 128 .* tensor=2 do not divide"):
        partitions(weight, axes, {"tensor": 2}, what="w1")
    plain = jax.ShapeDtypeStruct(weight.shape, jnp.float32)
    assert partitions(plain, axes, {"tensor": 2}, what="w1") == PartitionSpec(None, None, ("tensor",))


def _rest(weight: Encoded) -> tuple[Any, ...]:
    return weight.block, weight.packed, weight.dtype


WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "n_routed_experts": 64,
    "head_dim": 128,
    "num_attention_heads": 8,
    "index_head_dim": 32,
    "q_lora_rank": 128,
    "o_lora_rank": 256,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}


@pytest.mark.parametrize(("form", "scanned", "tokens"), [("fp4", False, 1), ("fp8", False, 1), ("fp4", True, 64)])
def test_no_stack_and_no_second_layer_is_decoded(form: str, scanned: bool, tokens: int) -> None:
    """XLA's plan: the encoded weights are arguments, and temporaries take less than a decoded stack."""
    config = Config.from_hf(tiny_config(**WIDE, expert_dtype=form))
    dtype = jnp.float32
    graph, state = nnx.split(nnx.eval_shape(lambda: in_source_form(Model(config, scanned=scanned), config, dtype)))

    def step(state: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graph, state)
        if scanned:
            return model(tokens)
        return model.extend(tokens, Cache.empty(config, 1, 64, dtype=dtype), last_only=True)[0]

    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    memory = jax.jit(step).lower(state, ids).compile().memory_analysis()
    held = sum(part.size * part.dtype.itemsize for part in jax.tree.leaves((state, ids)))
    assert memory.argument_size_in_bytes <= held
    stack = 4 * 64 * 256 * 256
    matrices = 12 + 1 + 3  # the stacks of four layers, and of the stage
    assert held < matrices * stack / (2 if form == "fp8" else 4)
    assert memory.temp_size_in_bytes < stack / 2
    dense = sum(
        4 * np.prod(variable.shape)
        for key, variable in nnx.to_flat_state(state)
        if isinstance(variable.get_value(), Encoded) and "experts" not in key and key[0] == "layers"
    )
    assert memory.temp_size_in_bytes < dense / 2
