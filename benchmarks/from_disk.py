"""A model whose routed experts come from the disk: seconds for a token against those of its reads alone.

Layers at V4-Flash's published width with random weights, converted to published codes. Tokens are generated one by
one; before each, the files are dropped from the page cache, so that an expert is in dsv4's own cache or comes from the
disk. The disk's rate is that of reading the same files cold in pieces of an expert's matrix, by as many threads, right
before and after; the limit is the bytes that were read for a token at that rate. ``alone`` is the smallest program: the
same token again and again, whose experts are in memory, so that nothing is read. Then, by calculation, what the
published models would read for a token, and take for that at least.

Run: python -m benchmarks.from_disk [--layers 2] [--tokens 12] [--cached 0.05,0.5] [--work DIR]

Needs 4 GB of disk for each layer, twice that while it is converted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.measure import dsv4, make_cold, table_of
from dsv4_convert.show.units import size
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import Kind, parameters

CONFIGS = Path("tests/data/configs")
_PIECE, _PIECES, _THREADS = 4 << 20, 192, 4
_PROMPT, _ROOM, _REPEATS = 8, 256, 9
#: Disks that the published models are calculated for, in GB/s.
_DISKS = (1.5, 7.0)


def disk_rate(folder: Path, seed: int) -> float:
    """Bytes per second of cold reads of pieces of the stacks of experts, at random places."""
    files = [file for file in folder.rglob("*") if ".experts." in str(file) and file.stat().st_size >= _PIECE]
    rng = np.random.default_rng(seed)
    make_cold(folder)

    places = [
        (file, int(rng.integers(file.stat().st_size // _PIECE)) * _PIECE)
        for file in (files[index] for index in rng.integers(len(files), size=_PIECES))
    ]

    def read(place: tuple[Path, int]) -> int:
        with place[0].open("rb", buffering=0) as stream:
            stream.seek(place[1])
            return len(stream.read(_PIECE))

    begun = time.perf_counter()
    with ThreadPoolExecutor(_THREADS) as pool:
        total = sum(pool.map(read, places))
    return total / (time.perf_counter() - begun)


def computing_alone(model: Any, width: np.dtype[Any]) -> tuple[float, float]:
    """The least seconds, and of processors, of one token whose experts are all in memory."""
    from dsv4_convert.model import Cache

    spent = []
    for _ in range(_REPEATS):
        cache = Cache.empty(model.config, 1, _ROOM, dtype=width, numerics=model.numerics)
        begun, used = time.perf_counter(), time.process_time()
        model.extend(np.array([[1]]), cache, np.array([1]))
        spent.append((time.perf_counter() - begun, time.process_time() - used))
    seconds, processor = zip(*spent[1:], strict=True)  # the first reads the experts
    return min(seconds), min(processor)


def generate(folder: Path, tokens: int, share: float) -> dict[str, Any]:
    """In a process of its own: generate, with a cache of a share of all experts."""
    from dsv4_convert.serve.from_disk import ModelFromDisk, plan_memory
    from dsv4_convert.serve.generate import Generator
    from dsv4_convert.weights.converted import Weights

    weights, width = Weights.open(folder), np.dtype(np.float32)
    plan = plan_memory(weights, width, prompts=1, room=_ROOM, limit=0)
    experts = weights.config.num_hidden_layers * weights.config.n_routed_experts
    fixed = plan.resident + plan.state + plan.work
    plan = dataclasses.replace(plan, limit=fixed + max(1, int(share * experts)) * plan.expert)
    model = ModelFromDisk(weights, width, plan=plan)
    generator = Generator(model, width)
    other, prompt = np.random.default_rng(0).integers(0, weights.config.vocab_size, (2, _PROMPT)).tolist()
    generator([other], new_tokens=tokens + 1)  # compiles, for a cache with room for as many
    model.reset_pace()
    before, begun, spent = disk_rate(folder, 1), [0.0], list[float]()

    def begin(row: int, token: int) -> None:
        spent.append(time.process_time() - begun[0])  # the first is that of the prompt
        make_cold(folder)
        begun[0] = time.process_time()

    generator([prompt], new_tokens=tokens + 1, on_token=begin)
    rate = (before + disk_rate(folder, 2)) / 2
    pace = model.pace
    assert pace is not None
    peak = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])
    seconds, nbytes = pace.seconds / pace.tokens, pace.bytes_read / pace.tokens
    alone, processor = computing_alone(model, width)
    return {
        "experts cached": f"{share:.0%}",
        "hit rate": round(pace.hit_rate, 2),
        "MB read a token": round(nbytes / 1e6),
        "disk GB/s": round(rate / 1e9, 2),
        "seconds a token": round(seconds, 3),
        "processor s": round(sum(spent[1:]) / tokens, 3),
        "alone": round(alone, 3),
        "alone, processor s": round(processor, 3),
        "limit": round(nbytes / rate, 3),
        "ratio": round(seconds / (nbytes / rate), 2),
        "planned GB": round(plan.limit / 1e9, 2),
        "peak GiB": round(peak / 2**20, 2),
        "load": round(os.getloadavg()[0], 1),
    }


def calculated(model: str) -> dict[str, Any]:
    """Bytes that a published model holds and reads, by its shapes: codes as published, other weights in float32."""
    raw = json.loads((CONFIGS / f"{model}.json").read_text(encoding="utf-8"))
    config = Config.from_hf(raw).without_stages()
    resident = expert = 0.0
    for path, rule, layer in parameters(config):
        elements = float(np.prod(rule.target_shape(config, layer)))
        if rule.kind is Kind.EXPERT:
            expert += elements * (1 / 2 + 1 / 32) / config.n_routed_experts
        elif path != "embed":
            resident += elements * (1 + 2**-14 if rule.kind is Kind.LINEAR else 4)
    read = expert * config.num_experts_per_tok  # of all layers
    row = {"model": model, "held": size(resident), "experts": size(expert * config.n_routed_experts)}
    return row | {"read a token": size(read)} | {f"at {disk} GB/s": f"{read / disk / 1e9:.2f} s" for disk in _DISKS}


def make(work: Path, layers: int) -> Path:
    """A converted checkpoint with layers of V4-Flash's width, CSA and HCA in turn, that route by scores."""
    raw = json.loads((CONFIGS / "DeepSeek-V4-Flash.json").read_text(encoding="utf-8"))
    ratios = [(4, 128)[layer % 2] for layer in range(layers)]
    changes = {"num_hidden_layers": layers, "compress_ratios": ratios, "num_hash_layers": 0, "vocab_size": 16384}
    changes["num_nextn_predict_layers"] = 0  # no stage
    (work / "config.json").write_text(json.dumps({**raw, **changes}), encoding="utf-8")
    for step in (
        ("golden", "make-checkpoint", work / "hf", "--config", work / "config.json"),
        ("convert", "hf-to-orbax", work / "hf", work / "orbax", "--dtype", "source"),
    ):
        done = dsv4(*step)
        print(json.dumps(done), file=sys.stderr, flush=True)
        if done["exit_code"]:
            raise SystemExit(3)
    shutil.rmtree(work / "hf")
    return work / "orbax"


def main() -> None:
    """Make the checkpoint, generate, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--cached", default="0.05,0.5", help="shares of all experts that the cache holds")
    parser.add_argument("--work", type=Path, default=Path("from-disk"), help="folder for everything that is made")
    parser.add_argument("--keep", action="store_true", help="leave the folder in place, and use it if it is there")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(generate(Path(options.one[0]), options.tokens, float(options.one[1]))))
        return
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=options.keep)
    folder = work / "orbax" if (work / "orbax").exists() else make(work, options.layers)
    command = [sys.executable, "-m", "benchmarks.from_disk", "--tokens", str(options.tokens), "--one", str(folder)]
    tables = {
        f"V4-Flash's width, {options.layers} layers, {options.tokens} tokens": [
            json.loads(subprocess.run([*command, share], check=True, capture_output=True, text=True).stdout)
            for share in options.cached.split(",")
        ],
        "calculated: at least, without a cache": [
            calculated(model) for model in ("DeepSeek-V4-Flash", "DeepSeek-V4-Pro")
        ],
    }
    for title, rows in tables.items():
        Console(width=200).print(table_of(title, rows))
    print(json.dumps(tables))
    if not options.keep:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
