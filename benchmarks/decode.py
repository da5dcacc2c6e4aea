"""Speed of the codecs: GB/s of output on one and on two threads, beside memcpy and torch in the same run.

The account of rounding has no output; its figure is that of the bfloat16 numbers it is about.

Run: python -m benchmarks.decode [--seconds 1] [--json FILE]

The matrices are V4-Flash's experts and dense weights; every thread writes into its own buffer, used before.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from dsv4_convert.formats import cast_plain, decode_fp4, decode_fp8
from dsv4_convert.formats.exactness import rounding

ROWS, COLUMNS = 2048, 4096
Array = np.ndarray[Any, Any]
BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)


def speed(work: Callable[[Array], object], dtype: np.dtype[Any], threads: int, seconds: float) -> float:
    """GB/s of output; ``work`` fills a flat buffer of the matrix's size."""
    buffers = [np.zeros(ROWS * COLUMNS, dtype) for _ in range(threads)]
    for buffer in buffers:
        work(buffer)

    def loop(buffer: Array) -> int:
        count = 0
        while time.perf_counter() < end:
            work(buffer)
            count += 1
        return count

    end = time.perf_counter() + seconds
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(loop, buffers))
    return total * buffers[0].nbytes / (time.perf_counter() - start) / 1e9


def cases() -> Iterator[tuple[str, np.dtype[Any], Callable[[Array], object]]]:
    """What is measured: name, dtype of the output, and the work."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 120, (ROWS, COLUMNS), dtype=np.uint8)
    packed = rng.integers(0, 256, (ROWS, COLUMNS // 2), dtype=np.uint8)
    blocks = rng.integers(110, 130, (ROWS // 128, COLUMNS // 128), dtype=np.uint8)
    groups = rng.integers(110, 130, (ROWS, COLUMNS // 32), dtype=np.uint8)
    floats = rng.uniform(0.5, 2, blocks.shape).astype(np.float32)
    halves = rng.normal(size=(ROWS, COLUMNS)).astype(BFLOAT16)
    source = np.zeros(ROWS * COLUMNS, BFLOAT16)
    yield "memcpy", BFLOAT16, lambda out: np.copyto(out, source)

    def shaped(out: Array, transpose: bool) -> Array:
        return out.reshape((COLUMNS, ROWS) if transpose else (ROWS, COLUMNS))

    for dtype in (BFLOAT16, FLOAT32):
        for turn in (False, True):
            name = f"{dtype.name}{', transposed' if turn else ''}"

            def fp8(out: Array, scale: Array, dtype: np.dtype[Any] = dtype, turn: bool = turn) -> object:
                return decode_fp8(codes, scale, dtype=dtype, transpose=turn, out=shaped(out, turn))

            def fp4(out: Array, dtype: np.dtype[Any] = dtype, turn: bool = turn) -> object:
                return decode_fp4(packed, groups, dtype=dtype, transpose=turn, out=shaped(out, turn))

            def plain(out: Array, dtype: np.dtype[Any] = dtype, turn: bool = turn) -> object:
                return cast_plain(halves, dtype=dtype, transpose=turn, out=shaped(out, turn))

            yield f"FP4, E8M0 -> {name}", dtype, fp4
            yield f"FP8, E8M0 -> {name}", dtype, partial(fp8, scale=blocks)
            yield f"FP8, F32 -> {name}", dtype, partial(fp8, scale=floats)
            yield f"BF16 -> {name}", dtype, plain
    single = halves.astype(FLOAT32)
    eights = codes.view(ml_dtypes.float8_e4m3fn)
    yield (
        "account of rounding: FP8, F32 -> bfloat16",
        BFLOAT16,
        lambda _: rounding(eights, floats, block=(128, 128), dtype=BFLOAT16),
    )
    yield "account of rounding: F32 -> bfloat16", BFLOAT16, lambda _: rounding(single, None, dtype=BFLOAT16)
    yield from torch_cases(codes, blocks)


def torch_cases(codes: Array, blocks: Array) -> Iterator[tuple[str, np.dtype[Any], Callable[[Array], object]]]:
    """The plain way in torch, where it is installed."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)
    weight = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    scale = torch.from_numpy(blocks).view(torch.float8_e8m0fnu)

    def work(out: Array) -> object:
        tiles = weight.float().reshape(ROWS // 128, 128, COLUMNS // 128, 128) * scale.float()[:, None, :, None]
        return tiles.to(torch.bfloat16)

    yield "torch: FP8, E8M0 -> bfloat16", BFLOAT16, work


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="per figure")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table = Table(title=f"GB/s of output, [{ROWS}, {COLUMNS}]", box=None)
    for column in ("what", "1 thread", "2 threads"):
        table.add_column(column)
    figures = {}
    for name, dtype, work in cases():
        figures[name] = [round(speed(work, dtype, threads, options.seconds), 2) for threads in (1, 2)]
        table.add_row(name, *map(str, figures[name]))
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
