"""The two sides of ``dsv4 parity`` as people write them, and defaults out of variables and pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

from dsv4_convert.cli import app
from dsv4_convert.convert import hf_to_orbax
from dsv4_convert.errors import UsageError
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint

GOLDEN = Path(__file__).parents[2] / "golden" / "data" / "tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("defaults")
    write_checkpoint(folder / "hf", tiny_config(), seed=0)
    hf_to_orbax(folder / "hf", folder / "orbax")
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project of its own, with a checkpoint and a golden."""
    for name in ("hf", "orbax"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "golden").symlink_to(GOLDEN)
    monkeypatch.chdir(tmp_path)


def asked(*arguments: str) -> dict[str, Any]:
    """The arguments of the run that a command asks for; nothing runs."""
    seen: dict[str, Any] = {}

    def run(checkpoint: object, golden: str, options: Any, **more: Any) -> None:
        seen.update(checkpoint=checkpoint, golden=golden, modes=options.modes, **more)
        raise UsageError("seen")

    with patch("dsv4_convert.parity.run.run_parity", run):
        result = CliRunner().invoke(app, ["parity", *arguments])
    assert seen or result.exit_code, result.output
    return seen or {"code": result.exit_code, "error": " ".join(result.stderr.split())}


@pytest.mark.parametrize(
    "arguments",
    [("orbax", "golden"), ("golden", "orbax"), ("orbax", "--golden", "golden"), ("--golden", "golden", "orbax")],
    ids=" ".join,
)
def test_checkpoint_and_golden_in_any_order(arguments: tuple[str, ...]) -> None:
    found = asked(*arguments)
    assert (found["checkpoint"], found["golden"]) == ("orbax", "golden")


def test_a_source_and_a_golden() -> None:
    found = asked("--source", "hf", "golden")
    assert (found["checkpoint"], str(found["source"]), found["golden"]) == (None, "hf", "golden")


def test_two_goldens_or_none_are_refused() -> None:
    two = asked("orbax", "golden", "--golden", "other")
    assert two["code"] == 2
    assert "two goldens are given: golden and --golden other" in two["error"]
    none = asked("orbax")
    assert none["code"] == 2
    assert "a golden is needed: dsv4 parity CHECKPOINT GOLDEN" in none["error"]


def test_variables_and_the_project_give_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line beats the variable, the variable beats the project, whose paths are relative to its file."""
    Path("pyproject.toml").write_text('[tool.dsv4]\ngolden = "golden"\nmode = "both"\nbaseline = "b.json"\n')
    Path("deep").mkdir()
    monkeypatch.chdir("deep")
    found = asked("../orbax")
    root = Path.cwd().parent
    assert found["golden"] == str(root / "golden")
    assert found["modes"] == ("isolated", "cumulative")
    assert found["baseline"].path == root / "b.json"
    monkeypatch.setenv("DSV4_MODE", "isolated")
    assert asked("../orbax")["modes"] == ("isolated",)
    assert asked("../orbax", "--mode", "cumulative")["modes"] == ("cumulative",)
    monkeypatch.setenv("DSV4_GOLDEN", str(GOLDEN))
    assert asked("../orbax")["golden"] == str(GOLDEN)
    assert asked("../orbax", "../golden")["golden"] == "../golden"


@pytest.mark.parametrize(
    ("text", "said"),
    [("goldn = 'x'", "did you mean golden?"), ("mode = 3", "mode = 3: expected text"), ("[", "cannot be read")],
)
def test_a_table_that_means_nothing_is_refused(text: str, said: str) -> None:
    Path("pyproject.toml").write_text(f"[tool.dsv4]\n{text}\n")
    found = asked("orbax", "golden")
    assert found["code"] == 2
    assert said in found["error"]
    assert "pyproject.toml" in found["error"]


def test_what_is_not_there_is_said_before_jax_is_loaded() -> None:
    """In a fraction of a second of this processor; loading JAX takes several."""
    program = (
        "import sys\nfrom dsv4_convert.cli import app\nsys.argv = ['dsv4', 'parity', 'orbax', './nope']\n"
        "try:\n    app()\nfinally:\n    print('jax' in sys.modules, 'numba' in sys.modules)\n"
    )
    before = os.times()
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    after = os.times()
    assert done.returncode == 3
    assert "./nope: no manifest.json there" in done.stderr
    assert done.stdout.split() == ["False", "False"]
    spent = (after.children_user - before.children_user) + (after.children_system - before.children_system)
    assert min(spent, time.monotonic() - begun) < 1.5


def test_the_versions_come_without_loading_anything() -> None:
    program = "import sys\nfrom dsv4_convert.cli import app\nsys.argv = ['dsv4', '-V']\ntry:\n    app()\nfinally:\n"
    program += "    print('jax' in sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, *others, loaded = done.stdout.splitlines()
    assert first == "0.1.0"
    assert loaded == "False"
    assert [line.split()[0] for line in others] == ["jax", "flax", "orbax-checkpoint", "Python"]


def test_colours_on_request() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "DSV4_COLOR", "TERM")}
    command = [sys.executable, "-m", "dsv4_convert"]
    for when, coloured in (("always", True), ("never", False), ("auto", False)):
        done = subprocess.run(
            [*command, "--color", when, "names", "norm"], capture_output=True, text=True, check=True, env=environment
        )
        assert ("\x1b[" in done.stdout) is coloured, when


def test_functions_take_paths_as_text(tmp_path: Path) -> None:
    """With the same result as a Path."""
    from dsv4_convert import Config, ParityOptions, Weights, orbax_to_hf, restore_model, run_parity

    assert Config.from_file("hf") == Config.from_file("orbax") == Config.from_file(Path("hf") / "config.json")
    assert restore_model("orbax").config.num_hidden_layers == Weights.open("orbax").config.num_hidden_layers
    assert run_parity("orbax", "golden", ParityOptions(layers=[0], taps=["attn.q"]), against="hf").passed
    assert run_parity(None, "golden", ParityOptions(layers=[0], taps=["attn.q"]), source="hf").passed
    assert orbax_to_hf("orbax", "again", requantize=True).tensors
    hf_to_orbax("hf", "second")
    assert Weights.open("second").config == Config.from_file("hf")
