"""The commands where a process may do little, and names are what people type: an answer, no traceback, no half file."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsv4_convert.cli import app
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.limits import TO_COMPUTE, TO_CONVERT

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "golden" / "data" / "tiny"
HF = tiny_config(num_hidden_layers=1, compress_ratios=[4], num_hash_layers=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("limits")
    write_checkpoint(work / "hf", HF, seed=0)
    done = CliRunner().invoke(app, ["convert", "hf-to-orbax", str(work / "hf"), str(work / "orbax")])
    assert done.exit_code == 0, done.output
    return work


#: Sets limits and runs a command: between fork and exec nothing may run in a process that JAX has threads in.
_LIMITED = """
import json, resource, runpy, sys
for which, most in json.loads(sys.argv.pop(1)):
    resource.setrlimit(which, (most, most))
runpy.run_module("dsv4_convert", run_name="__main__", alter_sys=True)
"""


def _dsv4(
    *words: str | Path,
    limits: Mapping[int, int] | None = None,
    environment: Mapping[str, str] | None = None,
    stdout: int | None = subprocess.PIPE,
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, json.dumps([*(limits or {}).items()]), *map(str, words)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        errors="backslashreplace",
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        timeout=500,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_address_space(folders: Path, tmp_path: Path) -> None:
    """Converted in the least that is asked for; with less, commands say so before XLA would abort or wait for ever."""
    convert = ("convert", "hf-to-orbax", folders / "hf", tmp_path / "out")
    parity = ("parity", folders / "orbax", "--golden", GOLDEN)
    generate = ("generate", folders / "orbax", "--tokens", "1")
    for command, needed in ((convert, TO_CONVERT), (parity, TO_COMPUTE), (generate, TO_COMPUTE)):
        done = _dsv4(*command, limits={resource.RLIMIT_AS: needed - 1})
        assert done.returncode == 4, done.stderr
        assert f"address space is {needed - 1:,} bytes" in done.stderr
        assert "ulimit -v" in done.stderr
    assert list(tmp_path.iterdir()) == []
    more = max(0, (os.cpu_count() or 1) - 2) << 27
    done = _dsv4(*convert, limits={resource.RLIMIT_AS: TO_CONVERT + more})
    assert done.returncode == 0, done.stderr
    assert _dsv4("verify", tmp_path / "out", limits={resource.RLIMIT_AS: 1 << 30}).returncode == 0


def test_few_open_files_and_files_that_may_not_grow(folders: Path, tmp_path: Path) -> None:
    """64 open files for 97 leaves; files of at most 4 KB, and the same run completes without the limit."""
    out = tmp_path / "out"
    done = _dsv4("convert", "hf-to-orbax", folders / "hf", out, limits={resource.RLIMIT_FSIZE: 4096})
    assert done.returncode == 4, done.stderr
    assert "cannot write: File too large" in done.stderr
    assert not out.exists()
    done = _dsv4("convert", "hf-to-orbax", folders / "hf", out, limits={resource.RLIMIT_NOFILE: 64})
    assert done.returncode == 0, done.stderr
    manifests = {(folder / "dsv4_manifest.json").read_bytes() for folder in (out, folders / "orbax")}
    assert len(manifests) == 1
    assert not out.with_name("out.dsv4-partial").exists()


NAMES = {
    "spaces": " a  b ",
    "composed": unicodedata.normalize("NFC", "Größe…×"),
    "decomposed": unicodedata.normalize("NFD", "Größe…×"),
    "another script": "模型",
    "dash": "-rf",
    "quotes": "a'b\"$(x)`;&|",
    "line end": "a\nb",
    "percent": "%2e%2e%s{0}",
    "long": "n" * 200,
}


@pytest.mark.parametrize("kind", NAMES)
def test_names(kind: str, folders: Path, tmp_path: Path) -> None:
    """As source and as destination, and of a golden: no file beside what was named."""
    name = NAMES[kind]
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / name
    source.symlink_to(folders / "hf")
    (tmp_path / "golden").mkdir()
    (tmp_path / "golden" / name).symlink_to(GOLDEN)
    out = tmp_path / "out" / name
    out.parent.mkdir()
    for command in (
        ["convert", "hf-to-orbax", source, out],
        ["verify", out, "--against", source],
        ["golden", "verify", tmp_path / "golden" / name],
    ):
        done = CliRunner().invoke(app, [str(word) for word in command])
        assert done.exit_code == 0, done.output
    assert os.listdir(out.parent) == [name]
    assert (out / "dsv4_manifest.json").stat().st_size > 1000


@pytest.mark.parametrize("kind", ["absent", "not to be written"])
def test_homes_and_temporary_folders(kind: str, folders: Path, tmp_path: Path) -> None:
    """A file in their place, as root may write to any folder. Numba's own cache: ``tests/formats``."""
    place = tmp_path / "place"
    if kind != "absent":
        place.write_text("")
    environment = dict.fromkeys(("HOME", "HF_HOME", "TMPDIR", "XDG_CACHE_HOME"), str(place / "below"))
    done = _dsv4("convert", "hf-to-orbax", folders / "hf", tmp_path / "out", environment=environment)
    assert done.returncode == 0, done.stderr


def test_streams(folders: Path, tmp_path: Path) -> None:
    """A terminal of ASCII, which has neither … nor ×; a reader that leaves; a disk that is full; nothing there."""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = _dsv4("golden", "show", GOLDEN, environment=ascii_only)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    done = _dsv4("convert", "hf-to-orbax", folders / "hf", tmp_path / "größe", environment=ascii_only)
    assert done.returncode == 2, done.stderr
    assert "not a name in UTF-8" in done.stderr
    assert list(tmp_path.iterdir()) == []
    with open("/dev/full", "w") as full:
        done = _dsv4("verify", folders / "orbax", stdout=full.fileno())
    assert done.returncode == 4, done.stderr
    assert "No space left on device" in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    for command in (["names"], ["golden", "show", str(GOLDEN)]):
        assert _dsv4(*command, stdout=writer).stderr == ""
    os.close(writer)
