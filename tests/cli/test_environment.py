"""An environment in which a library cannot start is one sentence with a way out: no traceback, and not exit code 70."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "golden" / "data" / "tiny"
PARITY = ("parity", "--source", "{hf}", "--golden", str(GOLDEN))
GENERATE = ("generate", "{hf}", "--tokens", "1,2")


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment") / "hf"
    write_checkpoint(folder, tiny_config())
    return folder


@pytest.mark.parametrize(
    ("variable", "value", "command", "said"),
    [
        ("JAX_PLATFORMS", "tpu", PARITY, "JAX_PLATFORMS=tpu asks for it; unset it, or set --platform"),
        ("JAX_PLATFORMS", "nonsense", GENERATE, "JAX_PLATFORMS=nonsense asks for it"),
        ("JAX_ENABLE_X64", "perhaps", PARITY, "JAX_ENABLE_X64: invalid truth value 'perhaps'"),
        ("XLA_FLAGS", "--xla_nonsense", PARITY, "XLA_FLAGS: this version of XLA has no --xla_nonsense"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "soon", ("inspect", "org/name"), "HF_HUB_DOWNLOAD_TIMEOUT: invalid literal"),
    ],
)
def test_what_a_library_refuses_is_said(
    hf: Path, variable: str, value: str, command: tuple[str, ...], said: str
) -> None:
    ended = _run([word.format(hf=hf) for word in command], variable, value)
    assert ended.returncode == 2, ended.stderr
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "a bug in dsv4" not in ended.stderr


def test_a_conversion_needs_no_platform(hf: Path, tmp_path: Path) -> None:
    ended = _run(["convert", "hf-to-orbax", str(hf), str(tmp_path / "orbax")], "JAX_PLATFORMS", "tpu")
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("coordinator", ["nowhere", "127.0.0.1:99999", ":80", "127.0.0.1:-1"])
def test_a_coordinator_is_a_host_and_a_port(hf: Path, coordinator: str) -> None:
    processes = ("--coordinator", coordinator, "--num-processes", "2", "--process-id", "0")
    ended = _run(["convert", "hf-to-orbax", str(hf), "x", *processes], "X", "")
    assert ended.returncode == 2
    assert "expected HOST:PORT" in ended.stderr


def _run(arguments: list[str], variable: str, value: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dsv4_convert", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), variable: value},
    )
