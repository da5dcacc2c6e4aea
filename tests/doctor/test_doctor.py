"""The findings of doctor on machines that lack something."""

from __future__ import annotations

import importlib.metadata
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from dsv4_convert.checkpoint import hub_health
from dsv4_convert.cli import app
from dsv4_convert.doctor import Diagnosis, Finding, State, checks, examine, packages
from dsv4_convert.doctor.packages import EXTRAS, Asked, check_packages
from dsv4_convert.files.remote import misconfigured

from ..checkpoint.hub_server import LoopbackHub

LOADS = SimpleNamespace(returncode=0, stdout='["cpu", 2, "cpu"]\n', stderr="")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that loads everything has done so."""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: LOADS)


def found(diagnosis: Diagnosis, check: str) -> Finding:
    (one,) = (finding for finding in diagnosis.findings if finding.check == check)
    return one


def test_this_machine_runs_its_tests() -> None:
    """The one run that really loads everything."""
    diagnosis = examine(offline=True)
    assert diagnosis.healthy, diagnosis
    assert found(diagnosis, "packages").state is State.OK
    assert "cpu" in found(diagnosis, "jax").found


def test_what_is_asked_for_is_what_the_installer_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyproject.toml and the metadata of a wheel say the same, in two formats."""
    sources = Path(__file__).parents[2] / "dsv4_convert" / "doctor" / "packages.py"
    monkeypatch.setattr(packages, "__file__", str(sources))  # where dsv4 is installed there is no pyproject.toml
    asked = Asked.read()
    assert set(asked.extras) == set(EXTRAS)
    lines = [*asked.core, *(f"{line}; extra == '{name}'" for name in asked.extras for line in asked.extras[name])]

    class Metadata(dict[str, str]):
        def get_all(self, key: str) -> list[str]:
            return {"Requires-Dist": lines, "Provides-Extra": list(asked.extras)}[key]

    noted = Metadata({"Requires-Python": asked.python})
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: noted)
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    again = Asked.read()
    assert again.core == asked.core
    assert {name: len(of) for name, of in again.extras.items()} == {name: len(of) for name, of in asked.extras.items()}


def test_packages_that_are_absent_old_or_without_their_extra() -> None:
    asked = Asked(
        python=">=3.99",
        core=("numpy<1", "absent-package>=2", "rich>=1"),
        extras={"tpu": ("jax[tpu]",), "gs": ("rich",)},
    )
    said = {finding.check: finding for finding in check_packages(asked, "3.11.7")}
    assert said["python"].state is State.MISSING
    assert ">=3.99" in str(said["python"].way_out)
    assert said["numpy"].found.endswith("asked for is <1")
    assert said["numpy"].way_out == "python -m pip install 'numpy<1'"
    assert said["absent-package"].found == "not installed"
    assert "rich" not in said
    assert "packages" not in said
    assert (said["[gs]"].state, said["[gs]"].way_out) == (State.OK, None)
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        assert (said["[tpu]"].state, said["[tpu]"].core) == (State.MISSING, False)
        assert "libtpu" in said["[tpu]"].found
        assert said["[tpu]"].way_out == "python -m pip install 'dsv4-convert[tpu]'"
        assert said["[tpu]"].commands == "compile, --platform tpu"


def test_a_core_that_does_not_load_exits_1(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nImportError: libz.so.1\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: broken)
    result = CliRunner().invoke(app, ["doctor", "--offline"])
    assert result.exit_code == 1
    assert "ImportError: libz.so.1" in result.stdout
    assert "the core commands do not work" in result.stdout


@pytest.mark.usefixtures("loads")
def test_an_absent_extra_is_told_and_exits_0(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "gcsfs":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    result = CliRunner().invoke(app, ["doctor", "--offline"])
    assert result.exit_code == 0, result.output
    assert "[gs]: python -m pip install 'dsv4-convert[gs]'" in result.stdout
    assert "the core commands work" in result.stdout


@pytest.mark.usefixtures("loads")
def test_the_hub_and_its_token(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    diagnosis = examine()
    assert found(diagnosis, "Hub").state is State.OK
    assert found(diagnosis, "Hub token").found == "there is one"
    assert str(tmp_path) in found(diagnosis, "Hub cache").found
    assert "hf_verysecret" not in str(diagnosis.to_json())
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(hub_health.constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.delenv("HF_TOKEN")
        diagnosis = examine()
    assert (found(diagnosis, "Hub").state, diagnosis.healthy) == (State.WARN, True)
    assert "HTTPS_PROXY" in str(found(diagnosis, "Hub").way_out)
    assert found(diagnosis, "Hub token").found.startswith("none")


@pytest.mark.usefixtures("loads")
def test_a_package_that_a_check_needs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "dsv4_convert.checkpoint.hub_health", raising=False)
    monkeypatch.delattr("dsv4_convert.checkpoint.hub_health")
    diagnosis = examine(offline=True)
    assert not diagnosis.healthy
    assert "huggingface_hub" in found(diagnosis, "Hub").found
    assert found(diagnosis, "text")


@pytest.mark.usefixtures("loads")
def test_machines_that_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_memory", lambda: 1 << 30)
    monkeypatch.setattr(checks.resource, "getrlimit", lambda which: (64, 64))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000))
    monkeypatch.setattr(checks, "_takes_files", lambda folder: False)
    monkeypatch.setattr(checks.sys, "stdout", SimpleNamespace(encoding="ANSI_X3.4-1968"))
    diagnosis = examine(offline=True)
    for check, way_out in {
        "memory": "--max-memory",
        "open files": "ulimit -n 4096",
        "disk, here": "make room",
        "numba cache": "NUMBA_CACHE_DIR",
        "text": "PYTHONUTF8=1",
    }.items():
        assert found(diagnosis, check).state is State.WARN
        assert way_out in str(found(diagnosis, check).way_out)
    assert diagnosis.healthy


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("HTTPS_PROXY", "foo://me:secret@proxy", "of a kind that the client does not know"),
        ("HTTPS_PROXY", "http://me:sec/ret@proxy", "is not a URL"),
        ("SSL_CERT_FILE", "/nope", "SSL_CERT_FILE"),
    ],
)
def test_what_keeps_the_hub_client_from_asking_is_said(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub_health.constants, "ENDPOINT", "https://me:secret@127.0.0.1:9")
    monkeypatch.setattr(hub_health.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv(variable, value)
    hub = next(finding for finding in checks._hub(offline=False) if finding.check == "Hub")
    assert hub.state is State.WARN
    assert hub.found.startswith("https://…@127.0.0.1:9: ")
    assert said in hub.found
    assert "sec" not in hub.found


def test_a_proxy_whose_package_is_missing() -> None:
    error = ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.")
    assert "socksio" in str(misconfigured(error))
    assert misconfigured(ImportError("another")) is None
    assert misconfigured(ValueError("another")) is None


def test_a_cache_folder_that_the_system_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_health.constants, "HF_HUB_CACHE", "/tmp/" + "x" * 300)
    said = {finding.check: finding for finding in checks._hub(offline=True)}
    assert (said["disk, Hub"].state, said["Hub cache"].state) == (State.MISSING, State.MISSING)
    assert "File name too long" in said["disk, Hub"].found
    assert not said["disk, Hub"].core
    assert "Hub token" in said
