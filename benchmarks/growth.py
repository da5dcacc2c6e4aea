"""How cost grows: conversion by layers and cores, verify by bytes, parity by layers and tokens, a report by taps.

Models of small width with random weights, one command after the other, each in a process of its own. Times are those of
the processors, so that other work on the machine does not show; memory is the peak of the process. The first row of
each command is mostly the start of Python and compilation.

Run: python -m benchmarks.growth [--layers 2 4 8 16] [--tokens 256 1024 4096 8192] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import dsv4, gigabytes
from dsv4_convert.golden.synthetic import tiny_config

#: Tokens of the goldens whose number of layers grows, and layers of those whose number of tokens grows.
_TOKENS, _LAYERS = 128, 2

Row = tuple[str, str, dict[str, Any]]


def config(layers: int, **changes: Any) -> dict[str, Any]:
    """``layers`` layers, CSA and HCA in turn, without drafts."""
    ratios = [(4, 128)[layer % 2] for layer in range(layers)]
    common = {"num_hash_layers": 0, "num_nextn_predict_layers": 0, "max_position_embeddings": 1 << 20}
    return tiny_config(num_hidden_layers=layers, compress_ratios=[*ratios, 0], **common, **changes)


def by_layers(work: Path, layers: int, cores: list[int]) -> Iterator[Row]:
    """Everything that grows with the number of layers."""
    wide = config(layers, hidden_size=512, moe_intermediate_size=256, n_routed_experts=32)
    made(work, wide)
    for count in cores:
        shutil.rmtree(work / "orbax", ignore_errors=True)
        with_cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, with_cores[:count])
        done = dsv4("convert", "hf-to-orbax", work / "hf", work / "orbax", "--dtype", "bfloat16")
        os.sched_setaffinity(0, with_cores)
        yield "convert", f"{layers} layers, {gigabytes(work / 'orbax')} GB, {count} cores", done
    yield "verify", f"{gigabytes(work / 'orbax')} GB", dsv4("verify", work / "orbax")
    yield from compared(work, _TOKENS, f"{layers} layers")
    found = json.loads((work / "report.json").read_text(encoding="utf-8"))
    page = ("report", work / "report.json", work / "report.json", "--report", work / "page.html")
    yield "report", f"{len(found['taps'])} taps", dsv4(*page)


def by_tokens(work: Path, tokens: int) -> Iterator[Row]:
    """Recording and parity of a prompt."""
    made(work, config(_LAYERS))
    yield from compared(work, tokens, f"{tokens:,} tokens")


def made(work: Path, raw: dict[str, Any]) -> None:
    """A checkpoint with this config."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    done = dsv4("golden", "make-checkpoint", work / "hf", "--config", work / "config.json")
    assert done["exit_code"] == 0, done


def compared(work: Path, tokens: int, size: str) -> Iterator[Row]:
    """Record a golden of random tokens, and compare the streamed layers."""
    golden = ("golden", "record", work / "hf", "--out", work / "golden", "--random", tokens, "--noise", "float32")
    yield "golden record", size, dsv4(*golden)
    given = ("--golden", work / "golden", "--program", "streamed", "--json", work / "report.json")
    yield "parity", size, dsv4("parity", "--source", work / "hf", *given)


def main() -> None:
    """Run all, printing each row when it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="*", default=[2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, nargs="*", default=[256, 1024, 4096, 8192])
    parser.add_argument("--cores", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--work", type=Path, default=Path("growth"), help="folder for what is made")
    options = parser.parse_args()
    rows = [row for layers in options.layers for row in shown(by_layers(options.work, layers, options.cores))]
    rows += [row for tokens in options.tokens for row in shown(by_tokens(options.work, tokens))]
    shutil.rmtree(options.work)
    print(json.dumps(rows))


def shown(rows: Iterator[Row]) -> Iterator[Row]:
    """The same rows, printed."""
    for what, size, done in rows:
        print(f"{what:14} {size:34} {done['cpu_seconds']:8} s {done['peak_gib']:7} GiB", flush=True)
        assert done["exit_code"] == 0, done
        yield what, size, done


if __name__ == "__main__":
    main()
