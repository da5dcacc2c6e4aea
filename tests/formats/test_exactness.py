"""The account of rounding: every code under every scale against exact fractions, and against torch's own casts."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from dsv4_convert.formats.exactness import Rounding, rounding
from dsv4_convert.formats.tables import BFLOAT16, FLOAT32

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
E2M1 = [Fraction(number) for number in ("0", "0.5", "1", "1.5", "2", "3", "4", "6")]
Array = np.ndarray[Any, Any]


def e4m3(code: int) -> Fraction | None:
    """The number that an e4m3fn code stands for, from the definition of the format; None for NaN."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return None
    number = Fraction(mantissa, 512) if exponent == 0 else (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)
    return -number if code & 128 else number


def to_float(number: Fraction, dtype: np.dtype[Any]) -> Fraction | None:
    """The nearest number of ``dtype``, ties to even, by integer arithmetic; None for infinity."""
    bits, least = (8, -133) if dtype == BFLOAT16 else (24, -149)
    if not number:
        return number
    size = abs(number)
    top = size.numerator.bit_length() - size.denominator.bit_length()
    top -= size < Fraction(2) ** top
    step = Fraction(2) ** max(top - bits + 1, least)
    found = round(size / step) * step  # Python rounds a fraction half to even
    return None if found >= Fraction(2) ** 128 else found


def expected(number: Fraction | None, dtype: np.dtype[Any]) -> float:
    """Relative change of one product."""
    if number is None or not number:
        return 0.0
    found = to_float(number, dtype)
    return float("inf") if found is None else float(abs(found - abs(number)) / abs(number))


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("byte", [0, 1, 2, 3, 4, 100, 127, 245, 246, 247, 250, 253, 254, 255])
def test_every_fp8_code_under_a_scale_byte(byte: int, dtype: np.dtype[Any]) -> None:
    codes = np.tile(np.arange(256, dtype=np.uint8), (2, 1)).reshape(4, 128).view(FP8)
    power = None if byte == 255 else Fraction(2) ** (byte - 127)
    numbers = [None if (value := e4m3(code)) is None or power is None else value * power for code in range(256)]
    changes = [expected(number, dtype) for number in numbers]
    found = rounding(codes, np.full((1, 1), byte, np.uint8), dtype=dtype)
    assert found == Rounding(512, 2 * sum(change > 0 for change in changes), max(changes))
    if dtype == BFLOAT16:
        assert (found.rounded == 0) == (3 <= byte <= 246 or byte == 255)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_every_fp4_code_under_every_scale_byte(dtype: np.dtype[Any]) -> None:
    """Each byte of two codes sixteen times under its scale."""
    packed = np.tile(np.arange(256, dtype=np.uint8), 256).reshape(256 * 16, 16)
    scales = np.repeat(np.arange(256, dtype=np.uint8), 16).reshape(-1, 1)
    counted, largest = 0, 0.0
    for byte in range(255):
        changes = [expected(E2M1[code & 7] * Fraction(2) ** (byte - 127), dtype) for code in range(16)]
        counted += 32 * sum(change > 0 for change in changes)
        largest = max(largest, *changes)
        one = rounding(packed[:16], np.full((16, 1), byte, np.uint8), dtype=dtype)
        assert one.rounded == 32 * sum(change > 0 for change in changes), byte
        assert (one.rounded == 0) == (byte <= 252)
    assert rounding(packed, scales, dtype=dtype) == Rounding(2 * packed.size, counted, largest)


def compared(exact: torch.Tensor) -> Rounding:
    """What torch's cast to bfloat16 changes of float32 numbers."""
    wide, narrow = exact.double(), exact.bfloat16().double()
    changed = (wide != narrow) & wide.isfinite()
    relative = ((narrow - wide).abs() / wide.abs())[changed]
    return Rounding(exact.numel(), int(changed.sum()), float(relative.max()) if changed.any() else 0.0)


@pytest.mark.parametrize("shape", [(128, 128), (130, 300), (1, 1), (257, 127)])
def test_fp8_under_float32_scales(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 256, shape, np.uint8).view(FP8)
    tiles = tuple(-(-size // 128) for size in shape)
    scale = np.exp(rng.normal(size=tiles) * 30).astype(np.float32)
    spread = torch.from_numpy(scale).repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    product = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn).float() * spread
    found = rounding(codes, scale, dtype=BFLOAT16)
    wanted = compared(product)
    assert (found.values, found.rounded) == (wanted.values, wanted.rounded)
    assert found.largest_relative == pytest.approx(wanted.largest_relative, rel=1e-12)
    assert rounding(codes, scale, dtype=FLOAT32) == Rounding(codes.size)


def test_fp4_under_float32_scales() -> None:
    rng = np.random.default_rng(6)
    packed = rng.integers(0, 256, (4, 32), np.uint8)
    scale = rng.uniform(0.1, 2, (4, 2)).astype(np.float32)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(4, 64)
    numbers = np.array([float(number) for number in E2M1], np.float32)[codes & 7] * np.where(codes & 8, -1, 1)
    product = torch.from_numpy((numbers * np.repeat(scale, 32, axis=1)).astype(np.float32))
    assert rounding(packed, scale, dtype=BFLOAT16) == compared(product)


def test_plain_weights() -> None:
    rng = np.random.default_rng(7)
    wide = np.frombuffer(rng.bytes(4 * 3_000_000), np.float32).reshape(3000, 1000)
    assert rounding(wide, None, dtype=BFLOAT16) == compared(torch.from_numpy(wide.copy()))
    assert rounding(wide, None, dtype=FLOAT32) == Rounding(wide.size)
    narrow = np.frombuffer(rng.bytes(2000), BFLOAT16)
    for dtype in (BFLOAT16, FLOAT32):
        assert rounding(narrow, None, dtype=dtype) == Rounding(1000)


def test_sums() -> None:
    assert Rounding(1, 2, 3.0) + Rounding(10, 20, 0.5) == Rounding(11, 22, 3.0)
    assert sum([Rounding(1)] * 3, Rounding()) == Rounding(3)
