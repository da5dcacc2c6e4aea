"""The codecs at the edges: ties, ends of the range, odd buffers, and a cache that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from dsv4_convert.errors import BadInput, Dsv4Error
from dsv4_convert.formats import (
    cast_plain,
    decode_fp4,
    decode_fp8,
    encode_fp4,
    encode_fp8,
    quantize_fp4,
    quantize_fp8,
)

Array = np.ndarray[Any, Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)
DTYPES = pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
BYTES = np.arange(256, dtype=np.uint8)
ONE = np.array([[127]], np.uint8)


def _around_every_tie(native: type[Any], codes: int, beyond: list[float]) -> Array:
    """Every number of a format, every midpoint of two neighbours, the float32 next to each, both signs: ``[1, n]``."""
    grid = np.arange(codes, dtype=np.uint8).view(native).astype(np.float32)
    points = np.concatenate([grid, (grid[:-1] + grid[1:]) / 2, np.array(beyond, np.float32)])
    near = [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))]
    magnitudes = np.concatenate([*near, np.float32([1e-45, 1e-38, 3e38])])
    values = np.concatenate([magnitudes, -magnitudes])
    return values[: values.size // 2 * 2][None]


def test_fp8_rounds_like_torch_at_every_tie() -> None:
    values = _around_every_tie(ml_dtypes.float8_e4m3fn, 127, [464.0, 480.0, np.inf])
    expected = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(encode_fp8(values, ONE, block=(1, values.size)), expected)


def test_fp4_rounds_like_ml_dtypes_at_every_tie() -> None:
    values = _around_every_tie(ml_dtypes.float4_e2m1fn, 8, [7.0, np.inf])
    expected = values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    packed = encode_fp4(values, ONE, group=values.size)
    assert np.array_equal(packed, expected[:, ::2] | expected[:, 1::2] << 4)


@pytest.mark.parametrize("scale", [40, 127, 200])
@DTYPES
def test_all_codes_come_back_nan_and_its_sign_included(dtype: np.dtype[Any], scale: int) -> None:
    factor = np.array([[scale]], np.uint8)
    for codes in (BYTES[None], BYTES.view(np.int8)[None], BYTES.view(ml_dtypes.float8_e4m3fn)[None]):
        decoded = decode_fp8(codes, factor.view(ml_dtypes.float8_e8m0fnu), dtype=dtype, block=(1, 256))
        assert np.array_equal(encode_fp8(decoded, factor, block=(1, 256))[0], BYTES)
    decoded = decode_fp4(BYTES[None], factor.view(np.int8), dtype=dtype, group=512)
    assert np.array_equal(encode_fp4(decoded, factor, group=512)[0], BYTES)


@DTYPES
def test_a_nan_has_no_payload_and_the_sign_of_code_and_scale(dtype: np.dtype[Any]) -> None:
    quiet, negative = (0x7FC0, 0xFFC0) if dtype == BFLOAT16 else (0x7FC00000, 0xFFC00000)
    odd = np.array([[0xFF812345]], np.uint32).view(np.float32)  # a negative NaN with a payload
    codes = np.array([[0x7F, 0xFF, 0x38]], np.uint8)
    for scale, expected in (
        (np.array([[255]], np.uint8), [quiet, negative, quiet]),
        (odd, [negative, quiet, negative]),
    ):
        found = decode_fp8(codes, scale, dtype=dtype)
        assert found.view(f"u{dtype.itemsize}")[0].tolist() == expected
    found = decode_fp4(np.array([[0xA2]], np.uint8), odd, dtype=dtype)
    assert found.view(f"u{dtype.itemsize}")[0].tolist() == [negative, quiet]


@pytest.mark.parametrize(("quantize", "largest"), [(quantize_fp8, 448.0), (quantize_fp4, 6.0)])
def test_the_power_of_two_is_exact_at_its_boundaries(quantize: Any, largest: float) -> None:
    for exponent in range(-126, 118):
        edge = np.float32(np.ldexp(largest, exponent))
        above = np.nextafter(edge, np.float32(np.inf))
        for amax, expected in ((edge, exponent), (-edge, exponent), (above, exponent + 1)):
            _, scale = quantize(np.array([[0.0, amax]], np.float32))
            assert scale.tolist() == [[expected + 127]], (amax, exponent)


def test_quantising_subnormal_numbers_and_zeros() -> None:
    tiny = np.array([[1e-45, -0.0]], np.float32)
    for quantize in (quantize_fp8, quantize_fp4):
        assert quantize(tiny)[1].tolist() == [[0]]
        assert quantize(np.zeros((1, 2), np.float32))[1].tolist() == [[127]]
    assert quantize_fp8(tiny)[0].tolist() == [[0, 0x80]]
    assert quantize_fp4(np.array([[-0.0, 0.0]], np.float32))[0].tolist() == [[0x08]]


def test_float32_scales_of_fp8() -> None:
    values = np.random.default_rng(3).normal(size=(260, 140)).astype(np.float32)
    values[:128, :128] = 0
    values[128:256, :128] *= np.float32(1e-42)
    codes, scale = quantize_fp8(values, scale_format="float32")
    amax = np.abs(np.pad(values, ((0, 124), (0, 116))).reshape(3, 128, 2, 128)).max((1, 3))
    assert scale.dtype == np.float32
    assert scale[0, 0] == 1
    assert scale[1, 0] == np.finfo(np.float32).tiny
    assert np.array_equal(scale[:, 1], amax[:, 1] / np.float32(448))
    spread = np.repeat(np.repeat(scale, 128, 0), 128, 1)[:260, :140]
    quotient = torch.from_numpy(values / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert np.array_equal(codes, quotient.view(torch.uint8).numpy())


def test_quantising_bfloat16_is_quantising_its_float32() -> None:
    values = np.random.default_rng(4).normal(size=(130, 66)).astype(BFLOAT16)
    for quantize in (quantize_fp8, quantize_fp4):
        for found, expected in zip(quantize(values), quantize(values.astype(np.float32)), strict=True):
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_no_scale_can_hold_is_refused_with_its_place(bad: float) -> None:
    values = np.ones((130, 300), np.float32)
    values[129, 257] = bad
    with pytest.raises(BadInput, match="row 128, column 256"):
        quantize_fp8(values)
    with pytest.raises(BadInput, match="row 129, column 256"):
        quantize_fp4(values)


def test_e2m1_cannot_hold_nan() -> None:
    with pytest.raises(BadInput, match="found 2 quotients"):
        encode_fp4(np.array([[np.nan, 1.0, -np.nan, 1.0]], np.float32), ONE)


def test_shapes_and_dtypes_that_do_not_fit() -> None:
    packed, groups = np.zeros((3, 20), np.uint8), np.zeros((3, 2), np.uint8)
    with pytest.raises(BadInput, match=r"FP4 scale: expected shape \(3, 2\).*\(3, 40\).*found \(3, 1\)"):
        decode_fp4(packed, groups[:, :1], dtype=BFLOAT16)
    with pytest.raises(BadInput, match="FP4 codes: expected a matrix of uint8, int8, found float8_e4m3fn"):
        decode_fp4(packed.view(ml_dtypes.float8_e4m3fn), groups, dtype=BFLOAT16)
    with pytest.raises(BadInput, match="found float64"):
        encode_fp8(np.zeros((2, 2)), ONE)
    with pytest.raises(BadInput, match="even number of columns"):
        encode_fp4(np.zeros((1, 3), np.float32), ONE)
    for group in (0, -2, 31):
        with pytest.raises(ValueError, match="group"):
            decode_fp4(packed, groups, dtype=BFLOAT16, group=group)
    with pytest.raises(ValueError, match="block"):
        decode_fp8(packed, ONE, dtype=BFLOAT16, block=(0, 128))
    with pytest.raises(ValueError, match="float16"):
        decode_fp8(packed, ONE, dtype=np.float16)
    with pytest.raises(ValueError, match="transposed"):
        cast_plain(np.zeros((2, 2, 2), np.float32), dtype=FLOAT32, transpose=True)
    frozen = np.zeros((3, 20), BFLOAT16)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        decode_fp8(packed, ONE, dtype=BFLOAT16, out=frozen)


@pytest.mark.parametrize("shape", [(0, 6), (6, 0), (0, 0), (1, 1), (1, 500), (500, 1)])
@pytest.mark.parametrize("transpose", [False, True])
def test_thin_and_empty_matrices(shape: tuple[int, int], transpose: bool) -> None:
    rows, columns = shape
    codes = np.full(shape, 0x38, np.uint8)  # 1.0
    scale = np.full((-(-rows // 128), -(-columns // 128)), 128, np.uint8)
    found = decode_fp8(codes, scale, dtype=BFLOAT16, transpose=transpose)
    assert np.array_equal(found, np.full(shape[::-1] if transpose else shape, 2, BFLOAT16))
    groups = np.full((rows, -(-2 * columns // 32)), 128, np.uint8)
    found = decode_fp4(np.full(shape, 0x22, np.uint8), groups, dtype=BFLOAT16, transpose=transpose)
    assert np.array_equal(found, np.full((2 * columns, rows) if transpose else (rows, 2 * columns), 2, BFLOAT16))


@pytest.mark.parametrize("transpose", [False, True])
def test_inputs_of_any_layout_are_read_and_left_alone(transpose: bool) -> None:
    rng = np.random.default_rng(5)
    raw = rng.integers(0, 120, 2 * 60 * 40 + 1, dtype=np.uint8)
    raw.flags.writeable = False  # as a mapped file is
    codes = raw[1 : 1 + 60 * 40].reshape(60, 40)
    expected = decode_fp8(codes.copy(), ONE, dtype=FLOAT32, transpose=transpose)
    assert np.array_equal(decode_fp8(codes, ONE, dtype=FLOAT32, transpose=transpose), expected)
    assert np.array_equal(decode_fp8(np.asfortranarray(codes), ONE, dtype=FLOAT32, transpose=transpose), expected)
    unaligned = raw[1:].view(BFLOAT16).reshape(60, 40)
    assert not unaligned.flags.aligned
    found = cast_plain(unaligned, dtype=FLOAT32, transpose=transpose)
    assert np.array_equal(found.T if transpose else found, unaligned.astype(np.float32))


def test_narrowing_keeps_the_sign_of_a_nan_and_overflows_to_infinity() -> None:
    words = np.array([[0x7F800001, 0xFF800001, 0xFFFFFFFF, 0x7F7FFFFF, 0xFF7F8000, 0x7F7F7FFF]], np.uint32)
    expected = [[0x7FC0, 0xFFC0, 0xFFC0, 0x7F80, 0xFF80, 0x7F7F]]
    assert cast_plain(words.view(np.float32), dtype=BFLOAT16).view(np.uint16).tolist() == expected


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int8, BFLOAT16, FLOAT32], ids=str)
def test_plain_transposition_keeps_every_bit(dtype: Any) -> None:
    size = np.dtype(dtype).itemsize
    raw = np.random.default_rng(6).integers(0, 256, (515, 257 * size), dtype=np.uint8)
    source = raw.view(dtype)
    found = cast_plain(source, dtype=dtype, transpose=True)
    assert found.shape == (257, 515)
    assert np.array_equal(found.view(f"u{size}"), source.view(f"u{size}").T)


@pytest.fixture
def flushing() -> Iterator[None]:
    """This thread treats subnormal floats as zero, as after loading a library built with -ffast-math."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def test_a_thread_that_flushes_subnormal_numbers_is_refused(flushing: None) -> None:
    for scale in (np.ones((1, 2), np.float32), np.full((1, 2), 127, np.uint8)):
        with pytest.raises(Dsv4Error, match="subnormal"):
            decode_fp8(BYTES[None], scale, dtype=FLOAT32)
        with pytest.raises(Dsv4Error, match="subnormal"):
            decode_fp4(BYTES[None, :32], scale, dtype=BFLOAT16)


def _decode_elsewhere(**environment: str) -> str:
    """Decode one FP8 number straight and one transposed in a new process with these settings of numba."""
    program = (
        "import numpy as np; from dsv4_convert.formats import decode_fp8;"
        "print([decode_fp8(np.full((1, 1), 0x38, np.uint8), np.full((1, 1), 128, np.uint8), dtype=np.float32,"
        " transpose=way).item() for way in (False, True)])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator", **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_place_for_compiled_kernels_is_no_error(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.touch()
    assert _decode_elsewhere(NUMBA_CACHE_DIR=str(occupied)) == "[2.0, 2.0]"


def test_damaged_compiled_kernels_are_compiled_again(tmp_path: Path) -> None:
    assert _decode_elsewhere(NUMBA_CACHE_DIR=str(tmp_path)) == "[2.0, 2.0]"
    indexes = list(tmp_path.rglob("*decode_*.nbi"))
    assert len(indexes) == 2  # the cache was used at all
    for index in indexes:
        index.write_bytes(b"")  # as a full disk or a crash leaves it
    assert _decode_elsewhere(NUMBA_CACHE_DIR=str(tmp_path)) == "[2.0, 2.0]"


@pytest.mark.parametrize("byte", range(256))
def test_transposed_fp4_is_exact_under_each_scale_alone(byte: int) -> None:
    """If all scales of a tile are in range, products are computed with integers; they must equal torch's."""
    packed = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (40, 2))  # 640 rows: more than one tile
    scale = np.full((640, 2), byte, np.uint8)
    codes = torch.from_numpy(np.stack([packed & 15, packed >> 4], axis=-1).reshape(640, 64).astype(np.int64))
    values = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])[codes]
    factor = torch.tensor([byte], dtype=torch.uint8).view(torch.float8_e8m0fnu).float()
    expected = (values * factor).bfloat16().T.contiguous()
    found = torch.from_numpy(decode_fp4(packed, scale, dtype=ml_dtypes.bfloat16, transpose=True).view(np.int16))
    numbers = ~expected.isnan()
    assert torch.equal(found[numbers], expected.view(torch.int16)[numbers])
    assert found.view(torch.bfloat16)[~numbers].isnan().all()


def test_transposed_fp4_with_fast_and_slow_scales_side_by_side() -> None:
    """Every column of groups has its own: some tiles are made in integers, their neighbours are not."""
    rng = np.random.default_rng(3)
    packed = rng.integers(0, 256, (700, 320), np.uint8)
    scale = rng.integers(2, 253, (700, 20), np.uint8)
    scale[300, 4], scale[650, 7], scale[5, 9] = 1, 253, 255
    turned = decode_fp4(packed, scale, dtype=ml_dtypes.bfloat16, transpose=True)
    straight = decode_fp4(packed, scale, dtype=ml_dtypes.bfloat16)
    assert np.array_equal(turned.view(np.uint16), straight.view(np.uint16).T)
