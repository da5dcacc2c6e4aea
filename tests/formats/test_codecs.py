"""The codecs against torch's own dtypes and against a naive expansion, bit for bit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv4_convert.errors import BadInput
from dsv4_convert.formats import (
    cast_plain,
    decode_fp4,
    decode_fp8,
    encode_fp4,
    encode_fp8,
    quantize_fp4,
    quantize_fp8,
)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)
TORCH = {BFLOAT16: torch.bfloat16, FLOAT32: torch.float32}
DTYPES = pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
#: Every E8M0 byte, the NaN among them.
BYTES = np.arange(256, dtype=np.uint8)
#: Float32 scales of every kind: ordinary, no powers of two, subnormal, huge, zero, negative, infinite, NaN; and around
#: each end of where integers make the products.
SCALES = np.array(
    [1.0, 0.3, 2.0**-7, 1e-39, 1.4e-45, 3e38, 0.0, -0.0, -1.7, np.inf, -np.inf, np.nan, 1 / 3, 2.0**-126,
     -2.0, 2.0**-118, 2.0**-117, 2.0**119, 2.0**120, 2.0**-125, 2.0**125, 2.0**126, 1.5 * 2.0**-117, -(2.0**125)],
    np.float32,
)  # fmt: skip


def _bits(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Bit patterns, every NaN as one and the same."""
    nan = np.isnan(array.astype(np.float32))
    bits = array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint32).copy()
    bits[nan] = 0xFFFF
    return bits


def _torch_bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    if tensor.dtype is torch.bfloat16:
        return _bits(tensor.contiguous().view(torch.int16).numpy().view(BFLOAT16))
    return _bits(tensor.contiguous().numpy())


def _e8m0(scale: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(scale.view(np.uint8).copy()).view(torch.float8_e8m0fnu).float()


def _e4m3(codes: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(codes.view(np.uint8).copy()).view(torch.float8_e4m3fn).float()


@DTYPES
@pytest.mark.parametrize("transpose", [False, True])
def test_every_fp8_code_under_every_e8m0_scale(dtype: np.dtype[Any], transpose: bool) -> None:
    codes = np.tile(BYTES, (256, 1))  # row s under scale byte s
    found = decode_fp8(codes, BYTES[:, None], dtype=dtype, block=(1, 256), transpose=transpose)
    expected = (_e4m3(codes) * _e8m0(BYTES)[:, None]).to(TORCH[dtype])
    assert np.array_equal(_bits(found.T if transpose else found), _torch_bits(expected))
    assert np.isnan(found.astype(np.float32)).sum() == 256 + 255 * 2


@DTYPES
@pytest.mark.parametrize("transpose", [False, True])
def test_every_fp4_byte_under_every_e8m0_scale(dtype: np.dtype[Any], transpose: bool) -> None:
    packed = np.tile(BYTES, (256, 1))
    found = decode_fp4(packed, BYTES[:, None], dtype=dtype, group=512, transpose=transpose)
    low, high = torch.from_numpy(packed & 15).long(), torch.from_numpy(packed >> 4).long()
    codes = torch.stack([E2M1[low], E2M1[high]], dim=-1).reshape(256, 512)
    expected = (codes * _e8m0(BYTES)[:, None]).to(TORCH[dtype])
    assert np.array_equal(_bits(found.T if transpose else found), _torch_bits(expected))


def test_fp4_is_torch_s_own_dtype_where_it_has_one() -> None:
    """ml_dtypes' e2m1 agrees with the table that the test above uses."""
    assert np.array_equal(np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32), E2M1.numpy())


@DTYPES
@pytest.mark.parametrize("transpose", [False, True])
def test_every_code_under_float32_scales_of_every_kind(dtype: np.dtype[Any], transpose: bool) -> None:
    codes = np.tile(BYTES, (len(SCALES), 1))
    scale = SCALES[:, None]
    expected8 = (_e4m3(codes) * torch.from_numpy(scale)).to(TORCH[dtype])
    found8 = decode_fp8(codes, scale, dtype=dtype, block=(1, 256), transpose=transpose)
    assert np.array_equal(_bits(found8.T if transpose else found8), _torch_bits(expected8))
    low, high = torch.from_numpy(codes & 15).long(), torch.from_numpy(codes >> 4).long()
    values = torch.stack([E2M1[low], E2M1[high]], dim=-1).reshape(len(SCALES), 512)
    expected4 = (values * torch.from_numpy(scale)).to(TORCH[dtype])
    for rows in (slice(None), *(slice(row, row + 1) for row in range(len(SCALES)))):  # together, and each alone
        found4 = decode_fp4(codes[rows], scale[rows], dtype=dtype, group=512, transpose=transpose)
        assert np.array_equal(_bits(found4.T if transpose else found4), _torch_bits(expected4[rows]))


def _random_scale(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray[Any, Any]:
    if kind == "e8m0":
        return rng.integers(100, 140, shape, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu)
    return np.ldexp(rng.uniform(1, 2, shape), rng.integers(-20, 10, shape)).astype(np.float32)


@given(
    st.integers(1, 700), st.integers(1, 300), st.sampled_from([(128, 128), (1, 32), (7, 5), (64, 1)]),
    st.sampled_from(["e8m0", "f32"]), st.sampled_from([BFLOAT16, FLOAT32]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_fp8_blocks_with_ragged_edges(
    rows: int, columns: int, block: tuple[int, int], kind: str, dtype: np.dtype[Any], transpose: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
    scale = _random_scale(rng, (-(-rows // block[0]), -(-columns // block[1])), kind)
    spread = np.repeat(np.repeat(scale.astype(np.float32), block[0], 0), block[1], 1)[:rows, :columns]
    expected = (codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * spread).astype(dtype)
    found = decode_fp8(codes.view(ml_dtypes.float8_e4m3fn), scale, dtype=dtype, block=block, transpose=transpose)
    assert found.dtype == dtype
    assert found.flags.c_contiguous
    assert np.array_equal(_bits(found.T if transpose else found), _bits(expected))


@given(
    st.integers(1, 600), st.integers(1, 300), st.sampled_from([32, 2, 10]), st.sampled_from(["e8m0", "f32"]),
    st.sampled_from([BFLOAT16, FLOAT32]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_fp4_groups_with_ragged_edges(
    rows: int, pairs: int, group: int, kind: str, dtype: np.dtype[Any], transpose: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    packed = rng.integers(-128, 128, (rows, pairs), dtype=np.int8)
    scale = _random_scale(rng, (rows, -(-2 * pairs // group)), kind)
    nibbles = np.stack([packed.view(np.uint8) & 15, packed.view(np.uint8) >> 4], -1).reshape(rows, 2 * pairs)
    spread = np.repeat(scale.astype(np.float32), group, 1)[:, : 2 * pairs]
    expected = (E2M1.numpy()[nibbles] * spread).astype(dtype)
    found = decode_fp4(packed, scale, dtype=dtype, group=group, transpose=transpose)
    assert np.array_equal(_bits(found.T if transpose else found), _bits(expected))


def test_the_low_nibble_is_the_even_element() -> None:
    """Byte 0x21: low nibble 1 (0.5) first, high nibble 2 (1.0) second."""
    assert decode_fp4(np.array([[0x21]], np.uint8), np.array([[127]], np.uint8), dtype=FLOAT32).tolist() == [[0.5, 1.0]]


@given(st.integers(1, 600), st.integers(1, 200), st.booleans(), st.integers(0, 99))
def test_plain_casts_are_torch_s(rows: int, columns: int, transpose: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**32, (rows, columns), dtype=np.uint32).view(np.float32)  # NaN and subnormals too
    narrowed = cast_plain(words, dtype=BFLOAT16, transpose=transpose)
    expected = torch.from_numpy(words).bfloat16()
    assert np.array_equal(_bits(narrowed.T if transpose else narrowed), _torch_bits(expected))
    halves = rng.integers(0, 2**16, (rows, columns), dtype=np.uint16).view(BFLOAT16)
    widened = cast_plain(halves, dtype=FLOAT32, transpose=transpose)
    wide = (halves.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal((widened.T if transpose else widened).view(np.uint32), wide.view(np.uint32))


def test_integers_never_become_floats() -> None:
    table = np.arange(6).reshape(2, 3)
    assert cast_plain(table, dtype=np.int64).tolist() == table.tolist()
    with pytest.raises(BadInput, match="int64"):
        cast_plain(table, dtype=BFLOAT16)


def test_a_slice_of_a_stack_is_filled_in_place() -> None:
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(0, 120, (40, 30), dtype=np.uint8), np.array([[120]], np.uint8)
    stack = np.full((3, 30, 40), 7, BFLOAT16)
    returned = decode_fp8(codes, scale, dtype=BFLOAT16, transpose=True, out=stack[1])
    assert np.shares_memory(returned, stack)
    assert np.array_equal(stack[1], decode_fp8(codes, scale, dtype=BFLOAT16).T)
    assert (stack[[0, 2]] == 7).all()
    for wrong in (stack[1].T, stack[1, :29], stack[1].astype(np.float32)):
        with pytest.raises(ValueError, match="out"):
            decode_fp8(codes, scale, dtype=BFLOAT16, transpose=True, out=wrong)


@pytest.mark.parametrize("kind", ["e8m0", "f32"])
def test_encoding_is_the_inverse_of_decoding(kind: str) -> None:
    rng = np.random.default_rng(1)
    codes = np.tile(BYTES[(BYTES & 127) != 127], (300, 2))  # all but NaN, both zeros among them
    scale = _random_scale(rng, (-(-300 // 128), -(-codes.shape[1] // 128)), kind)
    assert np.array_equal(encode_fp8(decode_fp8(codes, scale, dtype=FLOAT32), scale), codes)
    packed = np.tile(BYTES, (5, 1))
    groups = _random_scale(rng, (5, 16), kind)
    assert np.array_equal(encode_fp4(decode_fp4(packed, groups, dtype=FLOAT32), groups), packed)


@given(st.integers(0, 2**32 - 1))
def test_encoding_rounds_as_torch_and_saturates(seed: int) -> None:
    values = np.random.default_rng(seed).normal(scale=100, size=(64, 64)).astype(np.float32)
    one = np.array([[127]], np.uint8)
    expected = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(encode_fp8(values, one), expected)


def test_encoding_beyond_the_range() -> None:
    one = np.array([[127]], np.uint8)
    values = np.array([[1e30, -np.inf, 449.0, 2**-20, -(2**-20)]], np.float32)
    assert decode_fp8(encode_fp8(values, one), one, dtype=FLOAT32).tolist() == [[448.0, -448.0, 448.0, 0.0, -0.0]]
    assert np.signbit(decode_fp8(encode_fp8(values, one), one, dtype=FLOAT32))[0, 4]


@given(st.integers(1, 200), st.integers(1, 60), st.floats(-30, 30), st.integers(0, 99))
def test_quantising_picks_the_smallest_scale_that_holds_everything(
    rows: int, pairs: int, magnitude: float, seed: int
) -> None:
    values = (np.random.default_rng(seed).normal(size=(rows, 2 * pairs)) * 2.0**magnitude).astype(np.float32)
    for block, largest, (codes, scale), decode in (
        ((128, 128), 448, quantize_fp8(values), decode_fp8),
        ((1, 32), 6, quantize_fp4(values), decode_fp4),
    ):
        factors = scale.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
        for row in range(scale.shape[0]):
            for column in range(scale.shape[1]):
                tile = values[row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]]
                amax = np.abs(tile).max().astype(np.float64)
                assert amax <= largest * factors[row, column]
                assert amax > largest * factors[row, column] / 2
        # No element moves by more than half a step of the coarsest binade.
        spread = np.repeat(np.repeat(factors, block[0], 0), block[1], 1)[:rows, : 2 * pairs]
        step = {448: 32, 6: 2}[largest]
        assert (np.abs(decode(codes, scale, dtype=FLOAT32) - values) <= spread * step / 2).all()


def test_a_block_of_zeros_has_a_scale() -> None:
    codes, scale = quantize_fp8(np.zeros((3, 4), np.float32))
    assert (codes.tolist(), scale.tolist()) == ([[0] * 4] * 3, [[127]])


@pytest.mark.parametrize(
    ("codes", "scale", "complaint"),
    [
        (np.zeros((130, 5), np.uint8), np.zeros((1, 1), np.uint8), "(2, 1)"),
        (np.zeros((130, 5), np.uint8), np.zeros((1, 2), np.uint8), "(2, 1)"),
        (np.zeros((5, 5), np.uint8), np.zeros((1, 1), np.float16), "float16"),
        (np.zeros((5, 5), np.float32), np.zeros((1, 1), np.uint8), "float32"),
        (np.zeros((5,), np.uint8), np.zeros((1, 1), np.uint8), "(5,)"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_shapes(
    codes: np.ndarray[Any, Any], scale: np.ndarray[Any, Any], complaint: str
) -> None:
    with pytest.raises(BadInput) as caught:
        decode_fp8(codes, scale, dtype=FLOAT32)
    assert complaint in str(caught.value)
