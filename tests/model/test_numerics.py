"""Simulated quantisation, bit for bit against torch's and ml_dtypes' own number formats."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_convert.errors import UsageError
from dsv4_convert.golden.references.release import kernels
from dsv4_convert.golden.synthetic import tiny_config
from dsv4_convert.model import Numerics, attention, numerics
from dsv4_convert.model.attention import Earlier, Entries, _context, attend_as_released
from dsv4_convert.model.v41.numerics import V41Numerics
from dsv4_convert.spec.config import Config

RELEASE = tiny_config(
    hidden_size=128,
    moe_intermediate_size=128,
    head_dim=128,
    qk_rope_head_dim=64,
    q_lora_rank=128,
    o_lora_rank=64,
    index_head_dim=64,
)


def _values(seed: int, spread: int, rows: int = 64, width: int = 256) -> np.ndarray:
    """bfloat16 values whose groups are of very different sizes; some groups are zero, some values at powers of two."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, width)) * 2.0 ** rng.integers(-spread, spread + 1, (rows, width // 32)).repeat(
        32, 1
    )
    values[rng.random(values.shape) < 0.05] = 0
    values[::7, :64] = 0
    values[1::7, ::5] = 2.0 ** rng.integers(-spread, spread + 1, values[1::7, ::5].shape)
    return values.astype(ml_dtypes.bfloat16)


def _torch(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)


def _float32(found: jax.Array | torch.Tensor) -> np.ndarray:
    return found.float().numpy() if isinstance(found, torch.Tensor) else np.asarray(found, np.float32)


def _expected(values: np.ndarray, group: int, kind: type, most: float, least: float) -> np.ndarray:
    """The rounding of ml_dtypes' format, with the power of two found in exact integers."""
    groups = values.astype(np.float64).reshape(*values.shape[:-1], -1, group)
    largest = np.maximum(np.abs(groups).max(-1, keepdims=True).astype(np.float32), np.float32(least))
    mantissa, exponent = np.frexp(largest * np.float32(1 / most))
    scale = 2.0 ** np.where(mantissa == 0.5, exponent - 1, exponent)
    return (np.clip(groups / scale, -most, most).astype(kind).astype(np.float64) * scale).reshape(values.shape)


@pytest.mark.parametrize("group", [64, 128])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), spread=st.sampled_from([0, 3, 12]))
def test_fp8_rounds_as_torch_does(group: int, seed: int, spread: int) -> None:
    values = _values(seed, spread)
    found = _float32(jax.jit(numerics.fp8_rounded, static_argnums=1)(jnp.asarray(values), group))
    expected = _expected(values, group, ml_dtypes.float8_e4m3fn, 448.0, 1e-4)
    np.testing.assert_array_equal(found, expected)
    in_place = kernels.act_quant(_torch(values), group, "ue8m0", torch.float8_e8m0fnu, True)
    np.testing.assert_array_equal(_float32(in_place), expected)
    codes, scale = kernels.act_quant(_torch(values), group, "ue8m0", torch.float8_e8m0fnu)
    assert codes.dtype == torch.float8_e4m3fn
    np.testing.assert_array_equal(codes.double().numpy() * scale.double().numpy().repeat(group, -1), expected)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), spread=st.sampled_from([0, 3, 12]))
def test_fp4_with_fp8_scales_rounds_as_ml_dtypes_does(seed: int, spread: int) -> None:
    """The compressed entries of V4.1: a sixth of the largest value, rounded to e4m3 by torch."""
    values = _values(seed, spread)
    found = _float32(jax.jit(numerics.fp4_rounded_by_fp8, static_argnums=1)(jnp.asarray(values), 16))
    groups = values.astype(np.float32).reshape(len(values), -1, 16)
    largest = np.maximum(np.abs(groups).max(-1, keepdims=True), np.float32(6 * 2.0**-9))
    sixth = np.minimum(largest / np.float32(6), np.float32(448))
    scale = torch.from_numpy(sixth).to(torch.float8_e4m3fn).float().numpy()
    codes = np.clip(groups / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    expected = (codes.astype(np.float32) * scale).reshape(values.shape).astype(values.dtype)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize(
    ("step", "given"),
    [("key", (32, numerics.fp8_rounded)), ("entry", (16, numerics.fp4_rounded_by_fp8)),
     ("indexed", (32, numerics.fp4_rounded)), ("input", (32, numerics.fp8_rounded))],
)  # fmt: skip
def test_v41_rounds_every_channel_in_groups_of_its_own(step: str, given: tuple[int, Any]) -> None:
    """V4 leaves the rotated channels of keys and entries alone, and rotates the indexer's vectors by Hadamard."""
    values = jnp.asarray(_values(3, 3))[None]
    more = (64,) if step in ("key", "entry") else ()
    group, rounded = given
    assert jnp.array_equal(getattr(V41Numerics(True, True), step)(values, *more), rounded(values, group))
    assert not jnp.array_equal(getattr(Numerics(True, True), step)(values, *more), rounded(values, group))
    assert jnp.array_equal(getattr(V41Numerics(), step)(values, *more), values)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), spread=st.sampled_from([0, 3, 12]))
def test_fp4_rounds_as_its_format_does(seed: int, spread: int) -> None:
    values = _values(seed, spread)
    found = _float32(jax.jit(numerics.fp4_rounded, static_argnums=1)(jnp.asarray(values), 32))
    expected = _expected(values, 32, ml_dtypes.float4_e2m1fn, 6.0, 6 * 2.0**-126)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(_float32(kernels.fp4_act_quant(_torch(values), 32, True)), expected)


def test_every_middle_between_two_numbers_goes_to_the_even_one() -> None:
    """Groups whose largest value makes the scale 1, filled with the middles between neighbours, and with neighbours."""
    fp4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for kind, rounded, group, levels in (
        (ml_dtypes.float4_e2m1fn, numerics.fp4_rounded, 32, fp4),
        (
            ml_dtypes.float8_e4m3fn,
            numerics.fp8_rounded,
            64,
            np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),
        ),
    ):
        levels = levels.astype(np.float64)
        middles = np.concatenate([(levels[1:] + levels[:-1]) / 2, levels])
        middles = np.concatenate([middles, -middles])
        rows = np.zeros((-(-len(middles) // (group - 1)), group))
        flat = np.zeros(rows.shape[0] * (group - 1))
        flat[: len(middles)] = middles
        rows[:, 1:] = flat.reshape(rows.shape[0], -1)
        rows[:, 0] = levels.max()
        np.testing.assert_array_equal(
            _float32(rounded(jnp.asarray(rows, jnp.float32), group)), rows.astype(kind).astype(np.float32)
        )


@pytest.mark.parametrize("width", [32, 64, 128])
def test_hadamard_is_the_matrix_and_bit_equal_to_torch(width: int) -> None:
    values = _values(1, 2, width=width)
    found = _float32(jax.jit(numerics.hadamard)(jnp.asarray(values)))
    exact = values.astype(np.float64) @ scipy.linalg.hadamard(width) * width**-0.5
    np.testing.assert_allclose(found, exact, rtol=2**-8, atol=2**-8 * np.abs(exact).max() * 2**-8)
    np.testing.assert_array_equal(found, _float32(kernels.hadamard_transform(_torch(values), width**-0.5)))
    wide = numerics.hadamard(jnp.asarray(values, jnp.float32))
    np.testing.assert_allclose(wide, exact, rtol=1e-5, atol=1e-6 * np.abs(exact).max())


def test_query_heads_are_normalised_in_bfloat16() -> None:
    values = _values(2, 3, width=128).reshape(4, 4, 4, 128)
    found = _float32(jax.jit(Numerics(True, True).query, static_argnums=1)(jnp.asarray(values), 1e-3))
    q = _torch(values)
    scale = (q.square().mean(-1, keepdim=True) + 1e-3).float().rsqrt().bfloat16()
    np.testing.assert_array_equal(found, _float32(q * scale))
    assert (found != _float32(Numerics().query(jnp.asarray(values), 1e-3))).mean() > 0.05, "not the plain one"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe_intermediate_size": 96}, "moe_intermediate_size 96: a multiple of 128"),
        ({"head_dim": 96}, "head_dim - qk_rope_head_dim 32: a multiple of 64"),
        ({"index_head_dim": 96}, "index_head_dim 96: a power of two"),
    ],
)
def test_widths_that_no_group_divides_are_refused(change: dict[str, int], message: str) -> None:
    quantized = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }
    config = Config.from_hf(RELEASE | {"quantization_config": quantized})
    assert Numerics.of_release(config) == Numerics(True, True)
    assert Numerics.of_release(dataclasses.replace(config, weight_block_size=None)) == Numerics(True, False)
    with pytest.raises(UsageError, match=message):
        Numerics.of_release(dataclasses.replace(config, **change))


def test_kernels_against_plain_products() -> None:
    """Quantised products against float64 products of what the codes stand for; packed FP4 against ml_dtypes."""
    rng = np.random.default_rng(0)
    a, a_scale = kernels.act_quant(_torch(_values(3, 2)), 128, "ue8m0", torch.float8_e8m0fnu)
    inputs = a.double() * a_scale.double().repeat_interleave(128, -1)
    with torch.no_grad():
        codes = torch.from_numpy(rng.integers(0, 0x7F, (200, 256), dtype=np.uint8)).view(torch.float8_e4m3fn)
        scale = 2.0 ** torch.from_numpy(rng.integers(-6, 3, (2, 2)))
        weights = codes.double() * scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)
        expected = inputs @ weights.T
        found = kernels.fp8_gemm(a, a_scale, codes, scale)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())

        packed = rng.integers(0, 256, (48, 128), dtype=np.uint8)
        nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(48, 256).view(ml_dtypes.float4_e2m1fn)
        scale = 2.0 ** torch.from_numpy(rng.integers(-6, 3, (48, 8)))
        weights = torch.from_numpy(nibbles.astype(np.float64)) * scale.repeat_interleave(32, 1)
        expected = inputs @ weights.T
        found = kernels.fp4_gemm(a, a_scale, torch.from_numpy(packed), scale)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        codes, scales = kernels.fp4_act_quant(_torch(_values(4, 2)), 32)
        unpacked = codes.view(torch.uint8).numpy()
        unpacked = np.stack([unpacked & 15, unpacked >> 4], axis=-1).reshape(64, 256).view(ml_dtypes.float4_e2m1fn)
        again = unpacked.astype(np.float64) * scales.double().numpy().repeat(32, -1)
        np.testing.assert_array_equal(again, _expected(_values(4, 2), 32, ml_dtypes.float4_e2m1fn, 6.0, 6 * 2.0**-126))


def test_attention_kernel_against_a_softmax() -> None:
    """Sink, missing keys, more keys than a block; the same with exact sums, which take all keys at once."""
    rng = np.random.default_rng(5)
    q, kv = (torch.from_numpy(rng.normal(size=shape)).bfloat16() for shape in ((2, 7, 3, 32), (2, 150, 32)))
    sink = torch.from_numpy(rng.normal(size=3)).float()
    index = torch.from_numpy(np.stack([rng.permutation(150)[:140] for _ in range(14)]).reshape(2, 7, 140)).int()
    index[0, 3, 10:] = -1
    index[1, :, 64:128] = -1
    keys = kv.double()[torch.arange(2)[:, None, None], index.long().clamp(min=0)]
    scores = torch.einsum("bshc,bsxc->bshx", q.double(), keys) * 0.2
    scores = torch.where((index < 0)[:, :, None], -torch.inf, scores)
    sinks = sink.double()[:, None].expand(2, 7, 3, 1)
    shares = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    expected = torch.einsum("bshx,bsxc->bshc", shares, keys)
    found = kernels.sparse_attn(q, kv, sink, index, 0.2)
    torch.testing.assert_close(found.double(), expected, rtol=2**-6, atol=2**-8)
    with kernels.exact_sums():
        torch.testing.assert_close(
            kernels.sparse_attn(q, kv, sink, index, 0.2).double(), expected, rtol=2**-6, atol=2**-8
        )


def test_no_rounding_is_left_out_when_compiled() -> None:
    """At the width of a release XLA removes conversions to bfloat16 that are followed by one back, if it may."""
    rng = np.random.default_rng(6)
    q, kv = (rng.normal(size=shape).astype(ml_dtypes.bfloat16) for shape in ((1, 64, 64, 512), (1, 64, 512)))
    sink = rng.normal(size=64).astype(np.float32)
    seen = np.tril(np.ones((1, 64, 64), bool))
    block = np.zeros(seen.shape, np.int32)
    found = jax.jit(attend_as_released)(jnp.asarray(q), (jnp.asarray(kv),), *map(jnp.asarray, (seen, sink, block)))
    index = np.where(seen, np.arange(64), -1).astype(np.int32)
    expected = kernels.sparse_attn(_torch(q), _torch(kv), torch.from_numpy(sink), torch.from_numpy(index), 512**-0.5)
    assert (_float32(found) != _float32(expected)).mean() < 1e-2


@pytest.mark.parametrize(("window", "chosen"), [(128, 20), (48, 30), (100, None)], ids=["CSA", "short window", "HCA"])
@pytest.mark.parametrize("before", [0, 150], ids=["prompt", "one token"])
def test_attention_rounds_where_the_published_kernel_does(window: int, chosen: int | None, before: int) -> None:
    """The kernel gets lists of keys as the published code makes them: the window from its first token on, then entries.

    It rounds relative to the largest score so far, after every 64 keys; a choice comes in the order of its scores.
    """
    rng = np.random.default_rng(7)
    tokens, heads, width, entries, prompts = 180, 16, 64, 45, 2
    total = before + 1 if before else tokens
    query = np.arange(before, total)
    q = (2 * rng.normal(size=(prompts, len(query), heads, width))).astype(ml_dtypes.bfloat16)
    kv, values = (rng.normal(size=(prompts, count, width)).astype(ml_dtypes.bfloat16) for count in (total, entries))
    sink = rng.normal(size=heads).astype(np.float32)
    complete = np.broadcast_to((query + 1) // 4, (prompts, len(query))).astype(np.int32)
    seen = [rng.permutation(count)[:chosen] if chosen else np.arange(count) for count in complete.reshape(-1)]
    listed = np.stack([np.pad(own, (0, entries - len(own)), constant_values=-1) for own in seen])
    listed = listed.reshape(*complete.shape, entries)[..., : chosen or entries].astype(np.int32)

    places = window if before else min(total, window)
    near = np.maximum(query - window + 1, 0)[:, None] + np.arange(places)
    near = np.broadcast_to(np.where(near > query[:, None], -1, near), (prompts, len(query), places))
    index = np.concatenate([near, np.where(listed < 0, -1, listed + total)], axis=-1).astype(np.int32)
    kernel = (_torch(q), _torch(np.concatenate([kv, values], axis=1)), torch.from_numpy(sink), torch.from_numpy(index))
    expected = _float32(kernels.sparse_attn(*kernel, width**-0.5))

    past = Entries(*map(jnp.asarray, (values, complete)), jnp.asarray(listed) if chosen else None, jnp.full(2, places))
    earlier = None
    if before:
        held = np.pad(kv[:, :-1], ((0, 0), (window, 0), (0, 0)))[:, -(window - 1) :]
        earlier = Earlier(jnp.asarray(held), jnp.full(prompts, before))

    def run(*given: jax.Array) -> np.ndarray:
        new = jnp.asarray(kv[:, before:])
        context = _context(given[0], new, earlier, past, given[1], window=window, numerics=Numerics(True, True))
        return _float32(context)

    assert (run(jnp.asarray(q), jnp.asarray(sink)) != expected).mean() < 2e-3
    with patch.object(attention, "KERNEL_KEYS", 1000):  # one peak for all keys
        apart = (run(jnp.asarray(q), jnp.asarray(sink)) != expected).mean()
    assert apart > 0.02
