"""Several real processes under ``jax.distributed`` convert one model; the result is that of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4_convert.convert import hf_to_orbax
from dsv4_convert.convert.against import compare_with_source
from dsv4_convert.store import open_store, verify
from golden.synthetic import tiny_config, write_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]


def run(source: Path, destination: Path, count: int, *more: str) -> list[tuple[int, str]]:
    """``dsv4 convert hf-to-orbax`` in ``count`` processes; exit code and stderr of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dsv4_convert", "convert", "hf-to-orbax", str(source), str(destination), *more]
    command += ["--coordinator", f"localhost:{port}", "--num-processes", str(count), "--process-id"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen([*command, str(index)], env=environment, stderr=subprocess.PIPE, text=True)
        for index in range(count)
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    return [(process.returncode, error) for process, error in zip(started, errors, strict=True)]


@pytest.mark.parametrize("count", [2, 3])
def test_the_result_of_many_is_that_of_one(tmp_path: Path, count: int) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config())
    hf_to_orbax(tmp_path / "hf", tmp_path / "alone")
    results = run(tmp_path / "hf", tmp_path / "shared", count)
    assert [code for code, _ in results] == [0] * count, results
    assert "reads " in results[0][1]
    assert "reads " not in results[1][1]
    shared, alone = (
        {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}
        for root in (tmp_path / "shared", tmp_path / "alone")
    )
    assert shared == alone
    store = open_store(tmp_path / "shared")
    assert verify(store) == []
    assert compare_with_source(store, tmp_path / "hf") == []


def test_all_refuse_what_one_refuses(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config())
    (tmp_path / "out").mkdir()
    results = run(tmp_path / "hf", tmp_path / "out", 2)
    assert [code for code, _ in results] == [2, 2], results
    assert all("exists already" in error for _, error in results)
