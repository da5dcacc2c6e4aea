"""The surface that users and scripts rely on: the help of every command, and keys and types of all --json output.

Plain files below ``surface/`` hold both. Write an intended change there with

    DSV4_UPDATE_SURFACE=1 nox -s tests -- tests/cli/test_surface.py

and read the diff. The test finds the commands from the command line itself, so it misses none.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dsv4_convert.aot.report import CompileReport
from dsv4_convert.aot.topology import Slice
from dsv4_convert.checkpoint.hub_push import Pushed
from dsv4_convert.cli import app
from dsv4_convert.golden.archive import open_golden
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.inspection import Inspection
from dsv4_convert.parity.detail import Detail
from dsv4_convert.parity.report.data import ParityReport
from dsv4_convert.spec.config import Config
from dsv4_convert.weights.difference import CheckpointDifference

from ..checkpoint.hub_server import LoopbackHub
from .samples import samples

SURFACE = Path(__file__).parent / "surface"
GOLDEN = Path(__file__).parents[2] / "golden" / "data" / "tiny"
UPDATE = bool(os.environ.get("DSV4_UPDATE_SURFACE"))
WIDTH = 80
SLICE = {Slice: Slice.parse("v5p-8")}
REPO, COMMIT = "org/tiny", "3" * 40


def _walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from _walk(below, (*path, name))


#: Every command and group by its path; the first one is dsv4 itself.
EVERY = dict(_walk(typer.main.get_command(app)))
#: Those that write JSON.
WRITING = {" ".join(path) for path, command in EVERY.items() if any("--json" in param.opts for param in command.params)}


def frozen(file: Path, text: str) -> None:
    """Compare with what is frozen, or freeze it."""
    if UPDATE:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert file.is_file(), f"{file.name}: not frozen yet; see the top of {Path(__file__).name}"
    assert text == file.read_text(encoding="utf-8"), f"{file.name} changed; see the top of {Path(__file__).name}"


def test_the_help_of_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer import rich_utils

    monkeypatch.setattr(rich_utils, "MAX_WIDTH", WIDTH)
    monkeypatch.setattr(rich_utils, "COLOR_SYSTEM", None)
    monkeypatch.setattr(rich_utils, "FORCE_TERMINAL", False)
    names = set()
    for path in EVERY:
        result = CliRunner().invoke(app, [*path, "--help"], prog_name="dsv4")
        assert result.exit_code == 0, result.output
        assert "\x1b" not in result.stdout
        lines = [line.rstrip() for line in result.stdout.splitlines()]
        assert max(map(len, lines)) <= WIDTH
        name = ".".join(("dsv4", *path)) + ".txt"
        names.add(name)
        frozen(SURFACE / "help" / name, "\n".join(lines).strip() + "\n")
    assert {file.name for file in (SURFACE / "help").iterdir()} == names, "a command is gone; delete its file"


@pytest.mark.parametrize("path", EVERY, ids=lambda path: " ".join(path) or "dsv4")
def test_every_help_has_examples_that_parse(path: tuple[str, ...]) -> None:
    paragraphs = [" ".join(text.split()) for text in re.split(r"\n\s*\n|\f", EVERY[path].help or "")]
    examples = [text.removeprefix("Example: ") for text in paragraphs if text.startswith("Example: ")]
    assert examples, "no example"
    for example in examples:
        program, *words = shlex.split(example)
        assert program == "dsv4"
        assert tuple(words[: len(path)]) == path
        command = EVERY[()]
        while words and hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        assert not hasattr(command, "commands"), f"{example}: no command"
        command.make_context("dsv4", words)  # raises for an option that there is not, or an argument too many


#: Names of objects whose keys are data.
MAPS = frozenset(
    {
        "arrays",
        "changed",
        "facts",
        "files",
        "left_out",
        "mesh",
        "read",
        "rounded",
        "shapes",
        "shards",
        "values",
        "versions",
    }
    | {"written"}
)


def outline(documents: Iterable[Any]) -> str:
    """Keys and types of JSON documents, one line for each path, in order of the paths."""
    found: dict[str, set[str]] = {}

    def look(value: Any, path: str) -> None:
        if isinstance(value, Mapping):
            if not value:
                found.setdefault(path, set()).add("{}")
            for key, item in value.items():
                last = path.rpartition(".")[2]
                look(item, f"{path}.{'*' if last in MAPS else key}".lstrip("."))
        elif isinstance(value, list):
            if not value:
                found.setdefault(path, set()).add("[]")
            for item in value:
                look(item, f"{path}[]")
        else:
            found.setdefault(path, set()).add("null" if value is None else type(value).__name__)

    for document in documents:
        assert isinstance(document["schema_version"], int)
        look(json.loads(json.dumps(document)), "")
    # If a list or object has elements somewhere, drop the mark that it may be empty.
    more = {path for path in found for other in found if other != path and other.startswith((f"{path}[", f"{path}."))}
    told = {path: kinds - {"[]", "{}"} if path in more else kinds for path, kinds in sorted(found.items())}
    return "".join(f"{path}: {' | '.join(sorted(kinds))}\n" for path, kinds in told.items() if kinds)


def run(*arguments: str | Path, exit_code: int = 0) -> Any:
    """The JSON that a command writes to stdout, and nothing else."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json", "-"])
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("surface") / "hf"
    write_checkpoint(folder, tiny_config(), seed=0)
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace slow functions by ones that return a made-up value of the right type."""
    import dsv4_convert.aot.search
    import dsv4_convert.golden.recorder
    import dsv4_convert.golden.tokens
    import dsv4_convert.parity.run
    import dsv4_convert.serve.generate
    import dsv4_convert.weights.restore
    from dsv4_convert.serve.speculate import Drafts

    drafts = samples(Drafts, {})[0]
    monkeypatch.setattr(dsv4_convert.golden.recorder, "record_opened", lambda *_, **__: open_golden(GOLDEN))
    monkeypatch.setattr(dsv4_convert.weights.restore, "restore_model", lambda *_, **__: None)
    monkeypatch.setattr(
        dsv4_convert.serve.generate,
        "Generator",
        lambda *_, **__: type("Fake", (), {"drafts": drafts, "__call__": lambda *_, **__: [[1, 2]]})(),
    )
    monkeypatch.setattr(dsv4_convert.golden.tokens, "tokenizer_file", lambda path: path)
    monkeypatch.setattr(dsv4_convert.golden.tokens, "text_decoder", lambda file: str)
    monkeypatch.setattr(dsv4_convert.parity.run.ParityRun, "_run_all", lambda self: None)
    monkeypatch.setattr(dsv4_convert.aot.search, "compile_model", lambda *_, **__: samples(CompileReport, SLICE)[0])
    done = SimpleNamespace(returncode=0, stdout='["cpu", 1, "cpu"]\n', stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)


def test_the_json_of_every_command(hf: Path, hub: LoopbackHub, quick: None, tmp_path: Path) -> None:
    config = Path(__file__).parents[1] / "data" / "configs" / "DeepSeek-V4-Flash.json"
    orbax = tmp_path / "orbax"
    hub.add(REPO, COMMIT, {file.name: file.read_bytes() for file in hf.iterdir()})
    report = samples(ParityReport, {Detail: None, ParityReport | None: None})  # which are not in the JSON
    whole = [dataclasses.replace(one, checkpoint={}, golden={}, platform={}).to_json("sentence") for one in report]
    damaged = tmp_path / "damaged"

    def verified() -> list[Any]:
        documents = [run("verify", orbax)]
        chunk = orbax / "norm" / "0"
        chunk.write_bytes(bytes(len(chunk.read_bytes())))
        return [*documents, run("verify", orbax, exit_code=1)]

    def golden_verified() -> list[Any]:
        damaged.mkdir()
        for file in GOLDEN.iterdir():
            (damaged / file.name).write_bytes(file.read_bytes())
        content = bytearray((GOLDEN / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (damaged / "model.safetensors").write_bytes(content)
        return [run("golden", "verify", GOLDEN), run("golden", "verify", damaged, exit_code=1)]

    def beside_itself() -> Any:
        path = tmp_path / "parity.json"
        document = run("parity", orbax, "--golden", GOLDEN, "--layer", "0", "--taps", "attn.q", exit_code=1)
        tap = {"name": "layers.0.attn.q", "mode": "isolated", "verdict": "pass", "distance": None}
        path.write_text(json.dumps(document | {"taps": [tap]}), encoding="utf-8")
        return run("report", path, path)

    def pushed() -> list[Any]:
        planned = run("push", GOLDEN, REPO, "--dry-run")
        return [planned, planned | {"pushed": dataclasses.asdict(samples(Pushed, {})[0])}]

    generate = ("generate", orbax, "--tokens", "1,2", "--speculative")
    cases: dict[str, Callable[[], Iterable[Any]]] = {
        "convert hf-to-orbax": lambda: [
            run("convert", "hf-to-orbax", hf, orbax, "--dtype", "source"),
            run("convert", "hf-to-orbax", hf, tmp_path / "maxtext", "--layout", "maxtext"),
        ],
        "convert orbax-to-hf": lambda: [run("convert", "orbax-to-hf", orbax, tmp_path / "again")],
        "download": lambda: [run("download", REPO)],
        "inspect": lambda: [
            *(run("inspect", thing) for thing in (orbax, GOLDEN, config)),
            *(one.to_json() for one in samples(Inspection, {Config: Config.from_file(config)})),
        ],
        "diff": lambda: [
            run("diff", hf, orbax),
            *(one.to_json() for one in samples(CheckpointDifference, {})),
        ],
        "golden record": lambda: [run("golden", "record", hf, "--out", tmp_path / "golden", "--random", "4")],
        "golden show": lambda: [run("golden", "show", GOLDEN), run("golden", "show", tmp_path / "compact")],
        "golden verify": golden_verified,
        "golden compact": lambda: [run("golden", "compact", GOLDEN, "--out", tmp_path / "compact")],
        "golden diff": lambda: [run("golden", "diff", GOLDEN, GOLDEN)],
        "golden make-checkpoint": lambda: [run("golden", "make-checkpoint", tmp_path / "made")],
        "parity": lambda: [run("parity", orbax, "--golden", GOLDEN, "--layer", "0", exit_code=1), *whole],
        "report": lambda: [beside_itself()],
        "generate": lambda: [run(*generate), run(*generate, "--tokenizer", hf)],
        "compile": lambda: [
            run("compile", "--config", config, "--topology", "v5p-8"),
            *(one.to_json() for one in samples(CompileReport, SLICE)),
        ],
        "names": lambda: [run("names"), run("names", "layers.3.attn.wq_a"), run("names", "mtp.0.main_proj.weight")],
        "doctor": lambda: [run("doctor", "--offline")],
        "push": pushed,
        "verify": verified,
    }
    assert set(cases) == WRITING, "a command that writes JSON has no case here"
    order = sorted(cases, key=lambda name: (name == "verify", name == "golden show", not name.startswith("convert hf")))
    for name in order:
        frozen(SURFACE / "json" / f"{name.replace(' ', '.')}.txt", outline(cases[name]()))
    plan = run("download", REPO, "--dry-run")
    frozen(SURFACE / "json" / "download.dry-run.txt", outline([plan]))
    expected = {f"{name.replace(' ', '.')}.txt" for name in (*cases, "download --dry-run")}
    expected = {name.replace(".--dry-run", ".dry-run") for name in expected}
    assert {file.name for file in (SURFACE / "json").iterdir()} == expected
