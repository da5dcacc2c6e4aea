"""Conversion against the disk and against today's ways, side by side in one run: ratios, and peak memory.

At V4-Flash's full width: the published config cut to one CSA layer with hash routing and one HCA layer with learned
routing, random weights in the published format.

Run: python -m benchmarks.convert [--work DIR] [--repeats 3] [--only disk,tmpfs,short,zstd,today,layers] [--small]

- disk: ``--dtype source`` against ``cp`` and fsync of the same bytes; ``--dtype bfloat16`` against a plain loop that
  reads the same input, and writes and fsyncs as many incompressible bytes as the conversion.
- tmpfs: the same without a disk: one layer with 48 experts in the memory behind /dev/shm, against ``cp`` and against a
  loop that only writes as many bytes as ``--dtype bfloat16``. Two loops show the least that digests add: one reads,
  hashes and writes the source, one hashes source and result and writes the result. Needs 4 GB of memory.
- short: the same with 4 experts, which shows what a start costs.
- zstd: ``--compression zstd`` against none.
- today: one layer with a quarter of the experts, against (1) loading with transformers and saving with Orbax, and (2) a
  pass that writes a bfloat16 copy of the checkpoint with torch, then Orbax of the whole tree. Needs the ``reference``
  extra.
- layers: 1, 2 and 4 layers, with half of the experts.

Every contestant is a process of its own, starts with the input dropped from the page cache, and takes turns with the
others; the figure is the median, for processor time the least. Memory is the peak of the process less that of one that
only imports what dsv4 does. Needs 60 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import dsv4, gigabytes, make_cold, python

_IMPORTS = "import dsv4_convert.convert, dsv4_convert.cli.convert, dsv4_convert.formats.kernels"

_COPY = """
import os, shutil, sys
shutil.copytree(sys.argv[1], sys.argv[2], copy_function=lambda a, b: os.system(f"cp '{a}' '{b}'"))
for name in os.listdir(sys.argv[2]):
    descriptor = os.open(os.path.join(sys.argv[2], name), os.O_RDONLY)
    os.fsync(descriptor)
"""

_LOOP = """
import os, sys
source, out, total = sys.argv[1], sys.argv[2], int(sys.argv[3])
os.mkdir(out)
buffer = bytearray(16 << 20)
block = bytearray(os.urandom(64 << 20))
inputs = sorted(os.path.join(source, name) for name in os.listdir(source) if name.endswith(".safetensors"))
read = sum(map(os.path.getsize, inputs))
written = number = done = 0
for name in inputs:
    with open(name, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            done += count
            while written < total * done // read:
                block[:8] = number.to_bytes(8, "little")
                with open(os.path.join(out, str(number)), "wb", buffering=0) as file:
                    file.write(memoryview(block)[: total - written])
                    os.fsync(file.fileno())
                written += min(len(block), total - written)
                number += 1
"""

_WRITE = """
import os, sys
from blake3 import blake3
source, out, total, hashed = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "hashed"
os.mkdir(out)
buffer = bytearray(16 << 20)
inputs = sorted(os.path.join(source, name) for name in os.listdir(source)) if hashed else []
for name in inputs:
    with open(name, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            blake3(memoryview(buffer)[:count]).digest()
for number in range(0, total, len(buffer)):
    block = memoryview(buffer)[: total - number]
    if hashed:
        blake3(block).digest()
    with open(os.path.join(out, str(number)), "wb", buffering=0) as file:
        file.write(block)
"""

_COPY_HASHED = """
import os, sys
from blake3 import blake3
source, out = sys.argv[1:]
os.mkdir(out)
buffer = bytearray(16 << 20)
for name in os.listdir(source):
    with open(os.path.join(source, name), "rb", buffering=0) as stream:
        with open(os.path.join(out, name), "wb", buffering=0) as file:
            while count := stream.readinto(buffer):
                blake3(memoryview(buffer)[:count]).digest()
                file.write(memoryview(buffer)[:count])
"""

_TRANSFORMERS = """
import sys, numpy, torch, ml_dtypes
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
import orbax.checkpoint as ocp
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True))
def numpy_of(tensor):
    tensor = tensor.detach().contiguous()
    half = tensor.dtype is torch.bfloat16
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if half else tensor.numpy()
tree = {name: numpy_of(tensor) for name, tensor in model.state_dict().items()}
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(sys.argv[2], tree)
"""

_DEQUANTISE = """
import glob, os, sys, torch
from safetensors import safe_open
from safetensors.torch import save_file
E2M1 = torch.tensor([0., .5, 1., 1.5, 2., 3., 4., 6., -0., -.5, -1., -1.5, -2., -3., -4., -6.])
def decode(weight, scale):
    scale = scale.float()
    if weight.dtype is torch.float8_e4m3fn:
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
        return (weight.float() * spread).bfloat16()
    codes = weight.view(torch.uint8)
    values = torch.stack([E2M1[(codes & 15).long()], E2M1[(codes >> 4).long()]], -1).flatten(1)
    return (values * scale.repeat_interleave(32, 1)).bfloat16()
os.mkdir(sys.argv[2])
files = sorted(glob.glob(os.path.join(sys.argv[1], "*.safetensors")))
where = {}
for name in files:
    with safe_open(name, "pt") as shard:
        where.update(dict.fromkeys(shard.keys(), name))
for name in files:
    out = {}
    with safe_open(name, "pt") as shard:
        for key in shard.keys():
            if key.endswith(".scale") and key[:-5] + "weight" in where:
                continue
            tensor = shard.get_tensor(key)
            partner = key[:-6] + "scale" if key.endswith("weight") else ""
            if partner in where:
                with safe_open(where[partner], "pt") as other:
                    tensor = decode(tensor, other.get_tensor(partner))
            out[key] = tensor
    save_file(out, os.path.join(sys.argv[2], os.path.basename(name)))
"""

_SAVE_ALL = """
import glob, os, sys
from safetensors.numpy import load_file
import ml_dtypes, orbax.checkpoint as ocp
tree = {}
for name in sorted(glob.glob(os.path.join(sys.argv[1], "*.safetensors"))):
    tree.update(load_file(name))
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(sys.argv[2], tree)
"""

Run = Callable[[Path], list[dict[str, Any]]]


def contest(inputs: Path, work: Path, runs: Mapping[str, Run], repeats: int) -> dict[str, dict[str, float]]:
    """Every contestant in turn, ``repeats`` times, on cold inputs: median seconds, largest peak, GB written.

    Processor seconds are the least of the repeats, as other processes only add to them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    peak = dict.fromkeys(runs, 0.0)
    written = dict.fromkeys(runs, 0.0)
    for _ in range(repeats):
        for name, run in runs.items():
            out = work / "out"
            make_cold(inputs)
            steps = run(out)
            assert not any(step["exit_code"] for step in steps), (name, steps)
            seconds[name].append(sum(float(step["seconds"]) for step in steps))
            processor[name].append(sum(float(step["cpu_seconds"]) for step in steps))
            peak[name] = max([peak[name], *(float(step["peak_gib"]) for step in steps)])
            written[name] = gigabytes(out)
            for folder in work.glob("out*"):
                shutil.rmtree(folder)
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "cpu_seconds": min(processor[name]),
            "peak_gib": peak[name],
            "written_gb": written[name],
        }
        for name in runs
    }


def convert(source: Path, *options: object) -> Run:
    """A conversion as a contestant."""
    return lambda out: [dsv4("convert", "hf-to-orbax", source, out, *options)]


def checkpoint(work: Path, name: str, config: Mapping[str, Any]) -> Path:
    """Random weights in the published format, without the speculative stage, which nobody converts."""
    (work / f"{name}.json").write_text(json.dumps(dict(config) | {"num_nextn_predict_layers": 0}), encoding="utf-8")
    step = dsv4("golden", "make-checkpoint", work / name, "--config", work / f"{name}.json")
    assert not step["exit_code"], step
    return work / name


def disk(config: Mapping[str, Any], work: Path, repeats: int) -> dict[str, Any]:
    """Against the speed of the disk."""
    source = checkpoint(work, "disk", layers_of(config, 2))
    plan = work / "plan.json"
    dsv4("convert", "hf-to-orbax", source, work / "out", "--dry-run", "--json", plan)
    total = sum(json.loads(plan.read_text())["written"].values())
    found = contest(
        source,
        work,
        {
            "cp and fsync": lambda out: [python(_COPY, source, out)],
            "dsv4 --dtype source": convert(source, "--dtype", "source"),
            "plain loop": lambda out: [python(_LOOP, source, out, total)],
            "dsv4 --dtype bfloat16": convert(source, "--dtype", "bfloat16"),
        },
        repeats,
    )
    shutil.rmtree(source)
    return {
        "what": f"two layers, {gigabytes_read(plan)} GB in",
        "runs": found,
        "ratios": {
            "source : cp": ratio(found, "dsv4 --dtype source", "cp and fsync"),
            "bfloat16 : plain loop": ratio(found, "dsv4 --dtype bfloat16", "plain loop"),
        },
    }


def tmpfs(config: Mapping[str, Any], work: Path, repeats: int) -> dict[str, Any]:
    """Without a disk: what the processor has to do."""
    return _in_memory(config, 48, repeats)


def short(config: Mapping[str, Any], work: Path, repeats: int) -> dict[str, Any]:
    """A conversion that takes a moment: what a start costs."""
    return _in_memory(config, 4, repeats)


def _in_memory(config: Mapping[str, Any], experts: int, repeats: int) -> dict[str, Any]:
    shrunk = layers_of(config, 1) | {"n_routed_experts": experts, "vocab_size": 8192}
    shrunk |= {"num_experts_per_tok": min(experts, config["num_experts_per_tok"])}
    with tempfile.TemporaryDirectory(prefix="dsv4-benchmark-", dir="/dev/shm") as folder:
        work = Path(folder)
        source, plan = checkpoint(work, "source", shrunk), work / "plan.json"
        dsv4("convert", "hf-to-orbax", source, work / "out", "--dry-run", "--json", plan)
        total = sum(json.loads(plan.read_text())["written"].values())
        found = contest(
            source,
            work,
            {
                "cp": lambda out: [python(_COPY, source, out)],
                "read, hash and write": lambda out: [python(_COPY_HASHED, source, out)],
                "dsv4 --dtype source": convert(source, "--dtype", "source"),
                "start and plan": lambda out: [dsv4("convert", "hf-to-orbax", source, out, "--dry-run")],
                "only writing": lambda out: [python(_WRITE, source, out, total, "")],
                "the same with all digests": lambda out: [python(_WRITE, source, out, total, "hashed")],
                "dsv4 --dtype bfloat16": convert(source, "--dtype", "bfloat16"),
            },
            repeats,
        )
        read = gigabytes_read(plan)
    return {
        "what": f"one layer with {experts} experts, {read} GB in, in memory",
        "runs": found,
        "ratios": {
            "source : cp, time": ratio(found, "dsv4 --dtype source", "cp"),
            **{
                f"{name}, processor seconds per GB written": round(run["cpu_seconds"] / run["written_gb"], 2)
                for name, run in found.items()
                if run["written_gb"]
            },
        },
    }


def zstd(config: Mapping[str, Any], work: Path, repeats: int) -> dict[str, Any]:
    """The price and the gain of compression."""
    source = checkpoint(work, "zstd", layers_of(config, 1))
    found = contest(
        source,
        work,
        {
            "none": convert(source, "--compression", "none"),
            "zstd": convert(source, "--compression", "zstd"),
            "none, --dtype source": convert(source, "--dtype", "source"),
        },
        repeats,
    )
    shutil.rmtree(source)
    sizes = {name: run["written_gb"] / found["none"]["written_gb"] for name, run in found.items()}
    return {
        "what": "one layer in bfloat16",
        "runs": found,
        "ratios": {
            "zstd : none, time": ratio(found, "zstd", "none"),
            "zstd : none, bytes": round(sizes["zstd"], 2),
            "source : none, bytes": round(sizes["none, --dtype source"], 2),
        },
    }


def today(config: Mapping[str, Any], work: Path, repeats: int) -> dict[str, Any]:
    """Against the ways that people have now."""
    source = checkpoint(work, "today", layers_of(config, 1) | {"n_routed_experts": config["n_routed_experts"] // 4})

    def dequantise(out: Path) -> list[dict[str, Any]]:
        copy = out.with_name("out-copy")
        return [python(_DEQUANTISE, source, copy), python(_SAVE_ALL, copy, out)]

    found = contest(
        source,
        work,
        {
            "dsv4": convert(source),
            "transformers, then Orbax": lambda out: [python(_TRANSFORMERS, source, out)],
            "bfloat16 copy, then Orbax": dequantise,
        },
        repeats,
    )
    shutil.rmtree(source)
    base = float(measured_imports()["peak_gib"])
    return {
        "what": "one layer with a quarter of the experts",
        "runs": found,
        "ratios": {
            f"{name} : dsv4, {what}": value
            for name in ("transformers, then Orbax", "bfloat16 copy, then Orbax")
            for what, value in (
                ("time", ratio(found, name, "dsv4")),
                ("memory", round((found[name]["peak_gib"] - base) / (found["dsv4"]["peak_gib"] - base), 1)),
            )
        },
    }


def layers(config: Mapping[str, Any], work: Path, repeats: int) -> dict[str, Any]:
    """Time grows with the layers, memory does not."""
    sources = {}
    for count in (1, 2, 4):
        shrunk = layers_of(config, count) | {"n_routed_experts": config["n_routed_experts"] // 4}
        sources[f"{count} layer{'s' if count > 1 else ''}"] = checkpoint(work, f"layers{count}", shrunk)
    runs = contest(work, work, {name: convert(source) for name, source in sources.items()}, repeats)
    for source in sources.values():
        shutil.rmtree(source)
    seconds = {count: run["seconds"] for count, run in zip((1, 2, 4), runs.values(), strict=True)}
    per_layer = (seconds[4] - seconds[1]) / 3
    return {
        "what": "a quarter of the experts, bfloat16",
        "runs": runs,
        "ratios": {
            "seconds per further layer, 1 to 2": round(seconds[2] - seconds[1], 2),
            "seconds per further layer, 2 to 4": round((seconds[4] - seconds[2]) / 2, 2),
            "seconds without any layer": round(seconds[1] - per_layer, 2),
            "memory, 4 : 1": round(runs["4 layers"]["peak_gib"] / runs["1 layer"]["peak_gib"], 2),
        },
    }


def layers_of(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The config cut to ``count`` layers, CSA and HCA in turn, the first of them with hash routing."""
    ratios = [4 if number % 2 == 0 else 128 for number in range(count)]
    return dict(config) | {"num_hidden_layers": count, "compress_ratios": ratios, "num_hash_layers": 1}


def gigabytes_read(plan: Path) -> float:
    """GB of the tensors that a plan uses."""
    return round(sum(json.loads(plan.read_text())["read"].values()) / 1e9, 2)


def ratio(found: Mapping[str, Mapping[str, float]], one: str, other: str) -> float:
    """Of the seconds."""
    return round(found[one]["seconds"] / found[other]["seconds"], 2)


def measured_imports() -> dict[str, Any]:
    """The interpreter with everything that a conversion imports."""
    return python(_IMPORTS)


SECTIONS = {"disk": disk, "tmpfs": tmpfs, "short": short, "zstd": zstd, "today": today, "layers": layers}


def main() -> None:
    """Run the sections, print a table of each, and all figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("convert-benchmark"), help="folder for everything made")
    parser.add_argument("--config", type=Path, default=Path("tests/data/configs/DeepSeek-V4-Flash.json"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--small", action="store_true", help="a twelfth of the width, to try the benchmark itself")
    options = parser.parse_args()
    work: Path = options.work.absolute()
    work.mkdir(parents=True, exist_ok=False)
    config = dict(json.loads(options.config.read_text(encoding="utf-8")))
    if options.small:
        config |= {"hidden_size": 512, "moe_intermediate_size": 256, "n_routed_experts": 32, "vocab_size": 4096}
    base = float(measured_imports()["peak_gib"])
    results: dict[str, Any] = {"imports_gib": base}
    console = Console(width=100)
    for section in options.only.split(","):
        result = results[section] = SECTIONS[section](config, work, options.repeats)
        table = Table(title=f"{section}: {result['what']}", box=None, title_justify="left")
        for column in ("", "seconds", "of processors", "GB written", "GiB above imports"):
            table.add_column(column)
        for name, run in result["runs"].items():
            above = run["peak_gib"] - base
            seconds = [f"{run[key]:.1f}" for key in ("seconds", "cpu_seconds")]
            table.add_row(name, *seconds, f"{run['written_gb']:.1f}", f"{max(above, 0):.2f}")
        console.print(table)
        for name, value in result["ratios"].items():
            console.print(f"  {name}: [bold]{value}[/bold]")
    print(json.dumps(results))
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
