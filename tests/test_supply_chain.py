"""Files of a checkpoint are data: no pickle is read, none of its code runs, output stays where it belongs."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.audit import is_allowed, licences
from dsv4_convert.cli import app
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint

ROOT = Path(__file__).parents[1]
PACKAGES = ("dsv4_convert", "parity", "golden")
GOLDEN = ROOT / "golden" / "data" / "tiny"

#: Names and modules that run code, or read a format that does: as they are called, and as they are imported.
CALLS = {"eval", "exec", "compile", "__import__", "breakpoint"}
ATTRIBUTES = {
    *("torch.load", "numpy.fromregex", "os.system", "os.popen", "os.execv", "os.spawnv", "yaml.load", "pickle.load"),
    *("importlib.import_module", "importlib.util.spec_from_file_location", "importlib.util.module_from_spec"),
    *("runpy.run_path", "np.load", "pickle.loads", "joblib.load", "spec.loader.exec_module", "pandas.read_pickle"),
}
MODULES = {
    *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy", "code", "codeop"),
    *("subprocess", "multiprocessing", "ctypes", "yaml", "xml", "imp", "pty"),
}
KEYWORDS = {"trust_remote_code", "allow_pickle"}

#: (file, what): why it is no danger.
ALLOWED = {
    (
        "dsv4_convert/__init__.py",
        "importlib.import_module",
    ): "the package's own public names, from a table in that file",
    ("dsv4_convert/doctor/checks.py", "subprocess"): "this same Python, which loads the core or JAX and nothing else",
    ("dsv4_convert/platforms.py", "subprocess"): "this same Python, which starts XLA and nothing else",
    ("parity/report/junit.py", "xml.etree"): "writes XML and reads none",
    ("dsv4_convert/formats/kernels.py", "pickle"): "the name of an exception that Numba's own cache raises",
    ("golden/tokens.py", "np.load"): "with allow_pickle=False",
    ("golden/tokens.py", "allow_pickle=False"): "says no",
    ("golden/references/release/code.py", "importlib.util.spec_from_file_location"): "the folder of --release-code",
    ("golden/references/release/code.py", "importlib.util.module_from_spec"): "the folder of --release-code",
    ("golden/references/release/code.py", "spec.loader.exec_module"): "the folder of --release-code",
}


def _dangers(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name.split(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in MODULES:
                yield module
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                yield name
            case ast.Attribute() if (dotted := ast.unparse(node)) in ATTRIBUTES:
                yield dotted
            case ast.keyword(arg=str(name)) if name in KEYWORDS:
                yield f"{name}={ast.unparse(node.value)}"


def test_nothing_that_runs_what_it_reads() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    found = {(path.relative_to(ROOT).as_posix(), what) for path in files for what in _dangers(path)}
    assert found == ALLOWED.keys()
    assert len(files) > 100


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from torch import load; x = torch.load(y)",
        "eval(x)",
        "f(trust_remote_code=True)",
        "os.system(x)",
    ],
)
def test_the_search_finds(line: str, tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(line)
    assert len(list(_dangers(tmp_path / "x.py"))) == 1


# --- A pickle wherever a file is read ---------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.trace), "w"))


def _forms(trace: Path) -> dict[str, bytes]:
    plain, packed, array = pickle.dumps(Bomb(trace)), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:  # as torch.save writes
        archive.writestr("archive/data.pkl", plain)
        archive.writestr("archive/version", "3\n")
    np.save(array, np.array([Bomb(trace)], object), allow_pickle=True)
    return {
        "pickle": plain,
        "old pickle": pickle.dumps(Bomb(trace), protocol=0),
        "torch.save": packed.getvalue(),
        "numpy objects": array.getvalue(),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("supply")
    write_checkpoint(work / "hf", tiny_config(num_hidden_layers=1, compress_ratios=[4], num_hash_layers=0), seed=0)
    done = CliRunner().invoke(app, ["convert", "hf-to-orbax", str(work / "hf"), str(work / "orbax")])
    assert done.exit_code == 0, done.output
    return work


def _copy(folder: Path, to: Path) -> Path:
    """Hard links; a file is replaced, not written into."""
    for file in folder.rglob("*"):
        target = to / file.relative_to(folder)
        if file.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target)
    return to


#: Paths that are no lasting files: devices, and the shared memory of libraries' own threads.
HARMLESS = ("/dev/null", "/dev/shm/", "/proc/self/")
PLACES = (
    "config.json",
    "shard",
    "index",
    "companion",
    "manifest",
    "sources",
    "array",
    "golden",
    "golden array",
    "tokens",
)


@pytest.mark.parametrize("place", PLACES)
def test_a_pickle_is_refused_and_never_run(place: str, folders: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    with open(tmp_path / "check", "wb") as stream:
        pickle.dump(Bomb(tmp_path / "check-ran"), stream)
    pickle.loads((tmp_path / "check").read_bytes()).close()
    assert (tmp_path / "check-ran").exists()  # it would
    for number, (form, content) in enumerate(_forms(trace).items()):
        work = tmp_path / str(number)
        hf, orbax, golden = (
            _copy(source, work / name)
            for source, name in ((folders / "hf", "hf"), (folders / "orbax", "orbax"), (GOLDEN, "golden"))
        )
        shard = next(hf.glob("*.safetensors"))
        out = str(work / "out")
        file, command = {
            "config.json": (hf / "config.json", ["convert", "hf-to-orbax", str(hf), out]),
            "shard": (shard, ["convert", "hf-to-orbax", str(hf), out]),
            "index": (hf / "model.safetensors.index.json", ["convert", "hf-to-orbax", str(hf), out]),
            "companion": (hf / "pytorch_model.bin", ["convert", "hf-to-orbax", str(hf), out]),
            "manifest": (orbax / "dsv4_manifest.json", ["verify", str(orbax)]),
            "sources": (orbax / "dsv4_sources.json", ["verify", str(orbax), "--against", str(hf)]),
            "array": (orbax / "embed" / ".zarray", ["verify", str(orbax)]),
            "golden": (golden / "manifest.json", ["golden", "verify", str(golden)]),
            "golden array": (golden / "model.safetensors", ["golden", "verify", str(golden)]),
            "tokens": (work / "t.npy", ["golden", "record", str(hf), "--out", out, "--tokens", str(work / "t.npy")]),
        }[place]
        assert file.exists() or place in ("companion", "tokens", "index"), file
        file.unlink(missing_ok=True)
        file.write_bytes(content)
        done = CliRunner().invoke(app, command)
        assert not trace.exists(), (place, form)
        if place == "companion":  # not looked at
            assert done.exit_code == 0, done.output
        else:
            assert done.exit_code in (1, 2, 3), (form, done.output, done.exception)
            assert isinstance(done.exception, SystemExit)
            assert not Path(out).exists()


# --- Code that lies beside the weights, and where files are written ---------------------------------------------------

#: Runs commands, and after each prints what it created, changed, moved or removed, by path.
WATCHED = """
import json, os, sys
touched = set()
def note(path, folder=-1):
    if isinstance(path, (str, bytes, os.PathLike)):
        start = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else os.getcwd()
        touched.add(os.path.realpath(os.path.join(start, os.fsdecode(path))))
CHANGES = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.chmod": 2, "os.chown": 3, "os.utime": 3, "os.truncate": 9}
def watch(event, details):
    if event == "open" and not isinstance(details[0], int):
        path, mode, flags = details
        if (mode and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            note(path)
    elif event == "os.mkdir" and os.path.isdir(details[0]):
        pass  # asked for where it is there already, which changes nothing
    elif event in CHANGES:
        note(details[0], *details[CHANGES[event]:][:1])
    elif event in ("os.rename", "os.link"):
        note(details[0], details[2])
        note(details[1], details[3])
    elif event == "os.symlink":
        note(details[1], details[2])
    elif event in ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen"):
        touched.add(f"/runs/{details[0]}")
sys.addaudithook(watch)
from dsv4_convert.cli import app
for command in json.loads(sys.argv[1]):
    touched.clear()
    try:
        app(command)
    except SystemExit as end:
        assert not end.code, command
    print("touched " + json.dumps(sorted(touched)))
"""


def test_code_beside_weights_is_not_run_and_files_are_written_below_the_destination_only(
    folders: Path, tmp_path: Path
) -> None:
    """Runs the documented sequence of all commands, recording with transformers included."""
    work = tmp_path / "work"
    home, temporary, cwd, out, numba = (work / name for name in ("home", "tmp", "cwd", "out", "numba"))
    for folder in (home, temporary, cwd, out, numba):
        folder.mkdir(parents=True)
    hf = _copy(folders / "hf", work / "hf")
    for name in ("modeling_deepseek_v4.py", "configuration_deepseek_v4.py", "__init__.py", "sitecustomize.py"):
        (hf / name).write_text(f"open({str(work / 'ran')!r}, 'w')\n")
    before = {path: path.stat().st_mtime_ns for path in (*hf.rglob("*"), *GOLDEN.rglob("*"))}
    recording = ["golden", "record", hf, "--out", out / "golden", "--tokens", "1,2,3,4,5", "--noise", "float32"]
    commands = [
        ["convert", "hf-to-orbax", hf, out / "orbax", "--dtype", "source", "--json", out / "convert.json"],
        ["verify", out / "orbax", "--against", hf],
        recording,
        ["parity", out / "orbax", "--golden", out / "golden"],
        ["convert", "orbax-to-hf", out / "orbax", out / "hf"],
    ]
    listed = [[str(word) for word in command] for command in commands]
    environment = {"HOME": home, "TMPDIR": temporary, "NUMBA_CACHE_DIR": numba, "PYTHONPATH": ROOT}
    # Importing some parts of torch sets this variable for child processes.
    environment["TORCHINDUCTOR_CACHE_DIR"] = temporary / "inductor"
    environment["JAX_COMPILATION_CACHE_DIR"] = temporary / "programs"
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(listed)],
        capture_output=True,
        text=True,
        env={**os.environ, **{name: str(path) for name, path in environment.items()}, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("touched ") for line in done.stdout.splitlines() if line.startswith("touched ")]
    for command, line in zip(listed, lines, strict=True):
        touched = set(json.loads(line))
        elsewhere = {path for path in touched if not path.startswith((f"{out}/", f"{temporary}/", f"{numba}/"))}
        elsewhere -= {f"/runs/{sys.executable}"}  # this same Python, which looks whether XLA knows XLA_FLAGS
        assert {path for path in elsewhere if not path.startswith(HARMLESS)} == set(), command
        below = {path for path in touched if path.startswith(f"{out}/")}
        assert bool(below) == (command[0] not in ("verify", "parity")), command
    assert [*home.rglob("*"), *cwd.rglob("*")] == []
    assert not (work / "ran").exists()
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_config_that_names_code_is_refused(folders: Path, tmp_path: Path) -> None:
    hf = _copy(folders / "hf", tmp_path / "hf")
    raw = json.loads((hf / "config.json").read_text())
    (hf / "config.json").unlink()
    (hf / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for field, value in (("auto_map", {"AutoConfig": "modeling_evil.C"}), ("trust_remote_code", True)):
        (hf / "config.json").write_text(json.dumps({**raw, field: value}))
        for command in (
            ["convert", "hf-to-orbax", str(hf), str(tmp_path / "out")],
            ["golden", "record", str(hf), "--out", str(tmp_path / "golden"), "--tokens", "1,2"],
        ):
            done = CliRunner().invoke(app, command)
            assert done.exit_code == 3, done.output
            assert f"{field}: unknown field" in done.stderr
    assert not (tmp_path / "ran").exists()


# --- Licences of what is installed along ------------------------------------------------------------------------------


def test_licences_are_permissive() -> None:
    found = licences()
    assert {"jax", "orbax-checkpoint", "safetensors", "huggingface-hub"} <= found.keys()
    assert {name: stated for name, stated in found.items() if not is_allowed(stated[1])} == {}
    assert not any(map(is_allowed, ("", "GPL-3.0-only", "MIT AND GPL-2.0", "LGPL-2.1", "Proprietary", "AGPL-3.0")))
