"""Interrupted conversions: what continues them, what does not, and that every byte is the same in the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4_convert.convert import Advance, Storage, hf_to_orbax
from dsv4_convert.errors import ResourceError, UsageError
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.store import open_store, verify

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "hf", tiny_config(hidden_size=128, moe_intermediate_size=128, n_routed_experts=16))
    return tmp_path / "hf"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def interrupted(hf: Path, out: Path, **options: Any) -> None:
    def stop(advance: Advance) -> None:
        if advance.written > advance.to_write / 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf_to_orbax(hf, out, progress=stop, **options)
    assert not out.exists()


def edit_config(hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"bos_token_id": 7}))


def rewrite_a_shard(hf: Path) -> None:
    shard = sorted(hf.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes())


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (edit_config, {}, "fingerprint.config"),
        (rewrite_a_shard, {}, "fingerprint.changed: .*model-00003-of"),
        (lambda hf: None, {"storage": Storage.FLOAT32}, "fingerprint.storage: 'bfloat16' then, 'float32' now"),
        (lambda hf: None, {"layers": [0, 1]}, "leaves: "),
        (lambda hf: None, {"compression": "zstd"}, "compression: 'none' then, 'zstd' now"),
        (lambda hf: None, {"name": "another"}, "fingerprint.source: "),
    ],
)
def test_another_source_config_or_option_is_refused_with_the_reason(
    hf: Path, tmp_path: Path, change: Callable[[Path], None], options: dict[str, Any], reason: str
) -> None:
    interrupted(hf, tmp_path / "out")
    change(hf)
    with pytest.raises(UsageError, match=rf"(?s)an unfinished conversion with other settings is here.*{reason}"):
        hf_to_orbax(hf, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    hf_to_orbax(hf, tmp_path / "out", restart=True, **options)


def test_memory_and_threads_may_change(hf: Path, tmp_path: Path) -> None:
    interrupted(hf, tmp_path / "out", workers=1)
    _, summary = hf_to_orbax(hf, tmp_path / "out", workers=3, max_memory=1 << 30)
    assert summary.kept_bytes > summary.total_bytes / 4
    hf_to_orbax(hf, tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_second_run_on_the_same_destination_is_refused(hf: Path, tmp_path: Path) -> None:
    refused: list[ResourceError] = []

    def second(advance: Advance) -> None:
        if not refused:
            with pytest.raises(ResourceError, match=f"another process .pid {os.getpid()}. is writing it") as caught:
                hf_to_orbax(hf, tmp_path / "out")
            refused.append(caught.value)

    hf_to_orbax(hf, tmp_path / "out", progress=second)
    assert refused


@pytest.mark.parametrize("storage", [Storage.BFLOAT16, Storage.SOURCE])
def test_killed_processes_are_continued_to_identical_bytes(hf: Path, tmp_path: Path, storage: Storage) -> None:
    """SIGKILL at several points of one conversion, one after the other, and a last run to the end."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "dsv4_convert", "convert", "hf-to-orbax", str(hf), str(out)]
    command += ["--dtype", storage, "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    journal = tmp_path / "out.dsv4-partial" / "journal.jsonl"
    killed = 0
    for lines in (30, 90, 160):
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > lines):
                time.sleep(0.0005)
            process.send_signal(signal.SIGKILL)
        killed += process.returncode == -signal.SIGKILL
        if killed:
            assert out.exists() or journal.exists()
    assert killed
    if not out.exists():
        subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    assert verify(open_store(out)) == []
    hf_to_orbax(hf, tmp_path / "whole", storage=storage)
    assert files_of(out) == files_of(tmp_path / "whole")
    shutil.rmtree(out)
