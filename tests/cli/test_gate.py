"""``dsv4 parity`` with a baseline and for CI, as a script meets it; the action and the workflow that come with it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import typer.main
import yaml
from typer.testing import CliRunner

from dsv4_convert.cli import app
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "golden" / "data" / "tiny"
ACTION = ROOT / ".github" / "actions" / "parity" / "action.yml"
WORKFLOW = ROOT / "docs" / "parity-workflow.yml"


def dsv4(*arguments: str | Path, exit_code: int = 0) -> tuple[str, str]:
    """Run a command in this process; its stdout and stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gate") / "hf"
    write_checkpoint(folder, tiny_config(), seed=0)
    return folder


def test_a_baseline_from_nothing_to_a_regression(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "summary.md").write_text("before\n", encoding="utf-8")
    baseline = tmp_path / "baseline.json"
    common = ("parity", "--source", source, "--golden", GOLDEN, "--layer", "0", "--baseline", baseline)
    _, err = dsv4(*common, exit_code=3)
    assert "no such baseline; record one with --update-baseline" in err
    out, _ = dsv4(*common, "--update-baseline")
    assert "30 taps added" in " ".join(out.split())

    # As if it had been recorded by an implementation that was ten times as exact.
    document = json.loads(baseline.read_text())
    for numbers in document["measured"][0]["taps"].values():
        numbers.update({measure: number / 10 for measure, number in numbers.items()})
    baseline.write_text(json.dumps(document))
    files = ("-v", "--json", "-", "--junit", tmp_path / "junit.xml", "--github")
    out, err = dsv4(*common, *files, exit_code=1)
    report = json.loads(out)
    assert report["schema_version"] == 3
    assert report["verdict"] == "fail"
    assert report["baseline"]["passed"] is False
    assert report["counts"]["fail"] == 0
    first = report["baseline"]["grown"][0]
    assert set(first) == {"name", "mode", "measure", "recorded", "allowed", "found"}
    assert first["found"] > first["allowed"] > first["recorded"]
    assert "within tolerance, but grown since it was recorded, isolated" in err
    assert max(map(len, err.split("::error")[0].splitlines())) <= 80
    assert err.count("::error title=") == 1 + min(len({grown["name"] for grown in report["baseline"]["grown"]}), 9)
    failures = ET.parse(tmp_path / "junit.xml").findall(".//failure[@type='baseline']")
    assert len(failures) == len({grown["name"] for grown in report["baseline"]["grown"]})
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith("before\n## dsv4 parity\n")
    assert f"| `{first['name']}` | isolated | {first['measure']} |" in summary

    out, _ = dsv4(*common, "--github", "--update-baseline", "--reason", "other hardware")
    assert "raised (other hardware)" in " ".join(out.split())
    assert "::notice title=dsv4 parity::PASS" in out
    assert "No error has grown" in " ".join(dsv4(*common)[0].split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--update-baseline"], "expected --baseline FILE"),
        (["--baseline", "b.json", "--reason", "why"], "belongs to --update-baseline"),
    ],
)
def test_options_by_halves_are_refused(source: Path, options: list[str], message: str) -> None:
    _, err = dsv4("parity", "--source", source, "--golden", GOLDEN, *options, exit_code=2)
    assert message in " ".join(err.split())


def _parsed(arguments: list[str]) -> dict[str, Any]:
    """Arguments of ``dsv4`` as the real command reads them. Raises for an option that it does not have."""
    command = typer.main.get_command(app).commands["parity"]  # type: ignore[attr-defined]
    assert arguments[0] == "parity"
    return command.make_context("parity", arguments[1:]).params


def _stub(folder: Path) -> dict[str, str]:
    """An environment in which ``dsv4`` writes down its arguments, and does nothing else."""
    folder.mkdir()
    (folder / "dsv4").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{folder}/arguments"\n')
    (folder / "dsv4").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    "inputs",
    [
        {"checkpoint": "my orbax", "baseline": "$(touch hacked)", "arguments": "--mode both --dtype bfloat16"},
        {"source": "hf; touch hacked", "arguments": ""},
        {"checkpoint": "orbax", "arguments": "--quiet\n--mode both\n"},
    ],
)
def test_the_action_calls_the_command_as_it_is(tmp_path: Path, inputs: dict[str, str]) -> None:
    action = yaml.safe_load(ACTION.read_text(encoding="utf-8"))
    assert action["runs"]["using"] == "composite"
    given = {name: inputs.get(name, entry.get("default", "")) for name, entry in action["inputs"].items()}
    given["golden"] = "hf://datasets/x/y"
    steps = action["runs"]["steps"]
    (step,) = (step for step in steps if step.get("name") == "Parity")
    assert "${{" not in step["run"]  # an input in a script would be run
    environment = _stub(tmp_path / "bin")
    for name, value in step["env"].items():
        for text, replacement in (("inputs." + key, value_) for key, value_ in given.items()):
            value = value.replace("${{ %s }}" % text, replacement)  # noqa: UP031
        environment[name] = value.replace("${{ runner.temp }}", str(tmp_path))
        assert "${{" not in environment[name]
    subprocess.run(["bash", "-eo", "pipefail", "-c", step["run"]], env=environment, cwd=tmp_path, check=True)
    parameters = _parsed((tmp_path / "bin" / "arguments").read_text().splitlines())
    assert not (tmp_path / "hacked").exists()
    assert parameters["golden"] == "hf://datasets/x/y"
    assert parameters["github"] is True
    for name in ("checkpoint", "source", "baseline"):
        assert (None if parameters[name] is None else str(parameters[name])) == inputs.get(name)
    assert parameters["mode"] == ("both" if inputs.get("arguments") else None)
    assert parameters["quiet"] is ("--quiet" in inputs["arguments"])
    upload = steps[-1]
    assert upload["if"] == "always()"
    assert Path(parameters["junit"]).parent == tmp_path / "dsv4-parity"
    assert upload["with"]["path"] == "${{ runner.temp }}/dsv4-parity"
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]) for step in steps if "uses" in step)


def test_the_workflow_uses_what_there_is() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    action = yaml.safe_load(ACTION.read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    (parity,) = (step for step in steps if "/.github/actions/parity@" in step.get("uses", ""))
    assert (ROOT / parity["uses"].split("/", 2)[2].split("@")[0] / "action.yml") == ACTION
    assert parity["with"].keys() <= action["inputs"].keys()
    assert {name for name, entry in action["inputs"].items() if entry.get("required")} <= parity["with"].keys()
    _parsed(["parity", "--golden", "g", "--report", "r", *parity["with"]["arguments"].split()])
    (pytest_step,) = (step["run"] for step in steps if "pytest tests" in step.get("run", ""))
    plugin = (ROOT / "dsv4_convert" / "pytest_plugin.py").read_text(encoding="utf-8")
    for option in re.findall(r"--dsv4-[a-z-]+", pytest_step):
        assert f'"{option}"' in plugin
