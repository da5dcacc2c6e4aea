"""The account of rounding: every code under every scale against exact fractions, and against torch's own casts."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dsv4_convert.formats.exactness import Rounding, rounding
from dsv4_convert.formats.tables import BFLOAT16, FLOAT32

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
E2M1 = [Fraction(number) for number in ("0", "0.5", "1", "1.5", "2", "3", "4", "6")]
Array = np.ndarray[Any, Any]
TILE = (128, 128)


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
def test_every_fp8_code_under_every_scale_byte(dtype: np.dtype[Any]) -> None:
    """The codes alone under each byte, then all tiles at once, with a row of tiles cut off."""
    codes = np.tile(np.arange(256, dtype=np.uint8), (2, 1)).reshape(4, 128).view(FP8)
    total = Rounding()
    for byte in range(256):
        power = None if byte == 255 else Fraction(2) ** (byte - 127)
        numbers = [None if (value := e4m3(code)) is None or power is None else value * power for code in range(256)]
        changes = [expected(number, dtype) for number in numbers]
        found = rounding(codes, np.full((1, 1), byte, np.uint8), block=TILE, dtype=dtype)
        assert found == Rounding(512, 2 * sum(change > 0 for change in changes), max(changes)), byte
        exact = byte <= 246 if dtype == FLOAT32 else 3 <= byte <= 246
        assert (found.rounded == 0) == (exact or byte == 255), byte
        total += found
    tiles = np.tile(codes.view(np.uint8), (33, 256))[:130].view(FP8)  # 32 times in the first row, half in the second
    scale = np.stack([np.arange(256, dtype=np.uint8), np.full(256, 127, np.uint8)])
    assert rounding(tiles, scale, block=TILE, dtype=dtype) == Rounding(
        tiles.size, 32 * total.rounded, total.largest_relative
    )


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
    """Count the changes of torch's cast from float32 to bfloat16."""
    wide, narrow = exact.double(), exact.bfloat16().double()
    changed = (wide != narrow) & wide.isfinite()
    relative = ((narrow - wide).abs() / wide.abs())[changed]
    return Rounding(exact.numel(), int(changed.sum()), float(relative.max()) if changed.any() else 0.0)


def assert_same(found: Rounding, wanted: Rounding) -> None:
    """Equal counts, and the largest change as precise as float32."""
    assert (found.values, found.rounded) == (wanted.values, wanted.rounded)
    assert found.largest_relative == pytest.approx(wanted.largest_relative, rel=2**-24)


@pytest.mark.parametrize("spread_of_scales", [1, 30])
@pytest.mark.parametrize("shape", [(128, 128), (130, 300), (1, 1), (257, 127)])
def test_fp8_under_float32_scales(shape: tuple[int, int], spread_of_scales: int) -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 256, shape, np.uint8).view(FP8)
    tiles = tuple(-(-size // 128) for size in shape)
    scale = np.exp(rng.normal(size=tiles) * spread_of_scales).astype(np.float32)
    spread = torch.from_numpy(scale).repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    product = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn).float() * spread
    assert_same(rounding(codes, scale, block=TILE, dtype=BFLOAT16), compared(product))
    assert rounding(codes, scale, block=TILE, dtype=FLOAT32) == Rounding(codes.size)


def test_fp4_under_float32_scales() -> None:
    rng = np.random.default_rng(6)
    packed = rng.integers(0, 256, (4, 32), np.uint8)
    scale = rng.uniform(0.1, 2, (4, 2)).astype(np.float32)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(4, 64)
    numbers = np.array([float(number) for number in E2M1], np.float32)[codes & 7] * np.where(codes & 8, -1, 1)
    product = torch.from_numpy((numbers * np.repeat(scale, 32, axis=1)).astype(np.float32))
    assert_same(rounding(packed, scale, dtype=BFLOAT16), compared(product))
    assert rounding(packed, scale, dtype=FLOAT32) == Rounding(256)


@given(st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 2**17) | st.integers(0x7F7E0000, 0x7F820000), max_size=9))
@example([0x7F7F7FFF, 0xFF7F7FFF])
@example([0xFF7F8000])  # the smallest that overflows
def test_single_numbers(words: list[int]) -> None:
    """Numbers of every kind: near zero, subnormal, ordinary, on both sides of overflow, infinite, NaN."""
    numbers = np.array(words, np.uint32).view(np.float32)
    for part in (numbers, *numbers[:, None]):
        assert_same(rounding(part, None, dtype=BFLOAT16), compared(torch.from_numpy(part)))


def test_plain_weights() -> None:
    rng = np.random.default_rng(7)
    raw = rng.bytes(4 * 3_000_000 + 1)
    wide = np.frombuffer(raw, np.float32, offset=1, count=3_000_000).reshape(
        3000, 1000
    )  # as a mapped file, not aligned
    assert_same(rounding(wide, None, dtype=BFLOAT16), compared(torch.from_numpy(wide.copy())))
    ordinary = rng.normal(size=(300, 77)).astype(np.float32)
    assert_same(rounding(ordinary, None, dtype=BFLOAT16), compared(torch.from_numpy(ordinary)))
    assert rounding(wide, None, dtype=FLOAT32) == Rounding(wide.size)
    narrow = np.frombuffer(rng.bytes(2000), BFLOAT16)
    for dtype in (BFLOAT16, FLOAT32):
        assert rounding(narrow, None, dtype=dtype) == Rounding(1000)


def test_memory_does_not_grow_with_the_weight() -> None:
    """16 MiB of codes or numbers, and less than 6 MiB beside them."""
    shape = (4096, 4096)
    codes, packed = np.zeros(shape, FP8), np.zeros(shape, np.uint8)
    groups, tiles = (4096, 256), (32, 32)
    for stored, scale in (
        (codes, np.ones(tiles, np.uint8)),
        (codes, np.ones(tiles, np.float32)),
        (packed, np.full(groups, 254, np.uint8)),
        (packed, np.ones(groups, np.float32)),
        (np.zeros((1024, 4096), np.float32), None),
    ):
        rounding(
            stored[:128],
            scale if scale is None else scale[: 128 if stored is packed else 1],
            block=TILE,
            dtype=BFLOAT16,
        )
        tracemalloc.start()
        rounding(stored, scale, block=TILE, dtype=BFLOAT16)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 6 << 20


def test_integers_are_not_rounded() -> None:
    assert rounding(np.arange(7), None, dtype=BFLOAT16) == Rounding(7)


def test_sums() -> None:
    assert Rounding(1, 2, 3.0) + Rounding(10, 20, 0.5) == Rounding(11, 22, 3.0)
    assert sum([Rounding(1)] * 3, Rounding()) == Rounding(3)
