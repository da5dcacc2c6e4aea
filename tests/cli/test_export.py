"""``dsv4 convert orbax-to-hf`` as a person and a script meet it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsv4_convert.cli import app
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint


def dsv4(*arguments: object, exit_code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def orbax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    write_checkpoint(root / "hf", tiny_config())
    for dtype in ("source", "bfloat16"):
        dsv4("convert", "hf-to-orbax", root / "hf", root / dtype, "--dtype", dtype)
    return root


def test_there_and_back(orbax: Path, tmp_path: Path) -> None:
    out, _ = dsv4("convert", "orbax-to-hf", orbax / "source", tmp_path / "back")
    assert "367 tensors, 251.9 kB, 7 shards" in out
    assert "367 tensors have the bytes of the source" in out
    assert "left out" not in out


def test_quantised_again(orbax: Path, tmp_path: Path) -> None:
    out, err = dsv4("convert", "orbax-to-hf", orbax / "bfloat16", tmp_path / "back", "--requantize", "--json", "-")
    document = json.loads(out)
    assert document["schema_version"] == 1
    assert document["tensors"] == 367
    assert document["changed"] == {}
    assert "weights quantised again, no value changed" in err


def test_refusals(orbax: Path, tmp_path: Path) -> None:
    _, err = dsv4("convert", "orbax-to-hf", orbax / "source", tmp_path / "back", "--requantize", exit_code=2)
    assert "leave --requantize out" in err
    _, err = dsv4("convert", "orbax-to-hf", orbax / "hf", tmp_path / "back", exit_code=3)
    assert "a published checkpoint, which is not converted yet" in err
