"""The whole way of a model through processes that may hold a quarter of it: record, convert, verify, compare.

The limit is on the memory that a process allocates (RLIMIT_DATA: heap and anonymous mappings). The model is made so
large that a quarter of it is what the interpreters with their libraries, and one layer at work, take.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv4_convert.golden.synthetic import tiny_config, tiny_v41_config, write_checkpoint

pytestmark = pytest.mark.large

CONFIG = tiny_config(
    hidden_size=1024,
    moe_intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=8,
    head_dim=64,
    q_lora_rank=128,
    o_lora_rank=64,
    vocab_size=4096,
    n_routed_experts=112,
    compress_ratios=[0, 4, 128, 4, 4, 128, 0],
)

#: Limits itself, then becomes Python on the arguments. (A function that runs in the child before it starts would have
#: to be forked, which a process with JAX's threads must not be.)
_LIMITED = (
    "import os, resource, sys\n"
    "limit = int(sys.argv[1])\n"
    "resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])\n"
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("streaming")
    try:
        write_checkpoint(folder / "hf", CONFIG, seed=0, form="bf16")
        yield folder
    finally:
        shutil.rmtree(folder)  # gigabytes, which pytest would keep for three runs


def _limited(work: Path, *command: str, size: float = 4.2e9) -> subprocess.CompletedProcess[str]:
    """Run Python on ``command`` with a quarter of the published model, which has ``size`` bytes or more, as memory."""
    found = sum(file.stat().st_size for file in (work / "hf").iterdir())
    assert found > size
    return subprocess.run(
        [sys.executable, "-c", _LIMITED, str(found // 4), *command], capture_output=True, text=True, check=False
    )


def test_end_to_end_in_a_quarter_of_the_memory(work: Path) -> None:
    hf, orbax, golden, report = (str(work / name) for name in ("hf", "orbax", "golden", "report.json"))
    for command in (
        ["golden", "record", hf, "--out", golden, "--random", "40", "--noise", "float32"],
        ["convert", "hf-to-orbax", hf, orbax],
        ["verify", orbax, "--against", hf],
        ["parity", orbax, "--golden", golden, "--mode", "both", "--json", report],
    ):
        done = _limited(work, "-m", "dsv4_convert", *command)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    outcome = json.loads(Path(report).read_text(encoding="utf-8"))
    assert outcome["verdict"] == "pass"
    assert outcome["layers"] == [0, 1, 2, 3, 4, 5]
    assert outcome["logits"]["positions"] == 40


def test_the_limit_bites(work: Path) -> None:
    """The same checkpoint loaded whole does not fit."""
    code = (
        "import sys, pathlib, dsv4_convert\n"
        "from dsv4_convert.weights.published import PublishedWeights\n"
        "from dsv4_convert.spec.names import parameters\n"
        "weights = PublishedWeights.open(pathlib.Path(sys.argv[1]))\n"
        "held = [weights.read(path) for path, _, _ in parameters(weights.config)]\n"
    )
    done = _limited(work, "-c", code, str(work / "hf"))
    assert done.returncode != 0
    assert "MemoryError" in done.stderr


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tables")
    try:
        raw = tiny_v41_config(engram_vocab_size=850_000, engram_head_dim=256)
        write_checkpoint(folder / "hf", raw, seed=0)
        yield folder
    finally:
        shutil.rmtree(folder)


def test_tables_of_n_grams_go_through_in_chunks_of_rows(tables: Path) -> None:
    """A model of two tables is converted there and back in a quarter of its size, less than one table."""
    hf, orbax, again = (str(tables / name) for name in ("hf", "orbax", "again"))
    for command in (
        ["convert", "hf-to-orbax", hf, orbax, "--dtype", "source"],
        ["verify", orbax, "--against", hf],
        ["convert", "orbax-to-hf", orbax, again],
    ):
        found = _limited(tables, "-m", "dsv4_convert", *command, size=2.6e9)
        assert not found.returncode, f"{command}: {found.stderr}"
    assert "690 tensors have the bytes of the source" in " ".join((found.stdout + found.stderr).split())
    looked_up = (
        "import numpy, sys; from dsv4_convert.weights.converted import Weights; "
        "rows = numpy.random.default_rng(0).integers(0, 5_000_000, (300, 6)); "
        "print(Weights.open(sys.argv[1]).read_rows('layers.4.engram.embed', rows).shape)"
    )
    found = _limited(tables, "-c", looked_up, orbax, size=2.6e9)
    assert found.stdout.split() == ["(300,", "6,", "256)"], found.stderr
