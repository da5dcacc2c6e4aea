"""Errors as a newcomer meets them: what was given, and the way out. The right column is the promise."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from dsv4_convert.cli import app
from dsv4_convert.convert import hf_to_orbax
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "golden" / "data" / "tiny"


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A published checkpoint, its conversion, and a golden."""
    folder = tmp_path_factory.mktemp("errors")
    write_checkpoint(folder / "hf", tiny_config(), seed=0)
    hf_to_orbax(folder / "hf", folder / "orbax")
    return {"hf": folder / "hf", "orbax": folder / "orbax", "golden": GOLDEN}


def refused(*arguments: object, code: int) -> str:
    """The one error of a command, on one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert result.stderr.count("error: ") == 1
    return " ".join(result.stderr.split())


@pytest.mark.parametrize(
    "command",
    [("parity", "{hf}", "--golden", "{golden}"), ("verify", "{hf}"), ("generate", "{hf}", "--tokens", "1"),
     ("convert", "orbax-to-hf", "{hf}", "{hf}-again")],
    ids=lambda words: words[0],
)  # fmt: skip
def test_a_published_checkpoint_is_recognised(there: dict[str, Path], command: tuple[str, ...]) -> None:
    said = refused(*(word.format(**there) for word in command), code=3)
    assert f"{there['hf']}: a published checkpoint, which is not converted yet" in said
    assert f"dsv4 convert hf-to-orbax {there['hf']} DEST" in said
    assert f"dsv4 parity --source {there['hf']}" in said


def test_a_repository_and_a_golden_are_recognised_too(there: dict[str, Path]) -> None:
    assert "dsv4 parity --source deepseek-ai/DeepSeek-V4-Flash" in refused(
        "verify", "deepseek-ai/DeepSeek-V4-Flash", code=3
    )
    assert "a golden, not a checkpoint" in refused("verify", GOLDEN, code=3)


def test_an_orbax_checkpoint_of_others_is_not_taken_for_a_published_one(there: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(there["orbax"], tmp_path / "orbax")
    (tmp_path / "orbax" / "dsv4_manifest.json").unlink()
    assert "not a checkpoint written by dsv4" in refused("verify", tmp_path / "orbax", code=3)


def test_a_converted_checkpoint_is_not_converted_again(there: dict[str, Path], tmp_path: Path) -> None:
    said = refused("convert", "hf-to-orbax", there["orbax"], tmp_path / "x", code=3)
    assert f"{there['orbax']}: already converted" in said


def test_a_destination_that_exists_is_refused_before_the_plan(there: dict[str, Path], tmp_path: Path) -> None:
    with patch("dsv4_convert.checkpoint.locate.open_source", side_effect=AssertionError("refused before")):
        said = refused("convert", "hf-to-orbax", there["hf"], there["orbax"], code=2)
        assert f"{there['orbax']}: exists already, a finished conversion. --overwrite replaces it" in said
        said = refused("convert", "hf-to-orbax", there["hf"], there["hf"], "--overwrite", code=2)
        assert "is never overwritten" in said


@pytest.mark.parametrize(
    "command",
    [("convert", "hf-to-orbax", "{hf}"), ("convert", "orbax-to-hf", "{orbax}"), ("golden", "make-checkpoint")],
    ids=lambda words: words[-2],
)
def test_a_place_that_takes_nothing_is_named_with_the_reason(
    there: dict[str, Path], tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("")
    words = [word.format(**there) for word in command]
    places = {tmp_path / "file" / "x": f"{tmp_path / 'file'} is a file"}
    if sys.platform == "linux":
        places[Path("/proc/x")] = "/proc takes no new files"
    for place, why in places.items():
        said = refused(*words, place, code=4)
        assert why in said
        assert "Nothing was written; choose another destination" in said
        assert "is kept" not in said


def test_without_the_compiler_that_is_what_is_said(there: dict[str, Path]) -> None:
    """And not that the mesh does not suit a slice for which nothing can be compiled."""
    with patch("jax.experimental.topologies.get_topology_desc", side_effect=RuntimeError("no libtpu")):
        said = refused("compile", "--config", there["hf"], "--topology", "v5p-512", code=4)
        assert "pip install 'dsv4-convert[tpu]'" in said
        assert "pip install 'dsv4-convert[tpu]'" in refused(
            "compile", "--config", there["hf"], "--find-mesh", "v5p", code=4
        )


def test_another_architecture_is_bad_input_though_names_agree(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = ("model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight")
    save_file({name: np.zeros((4, 8), np.float32) for name in names}, tmp_path / "model.safetensors")
    assert "expected model_type 'deepseek_v4' or 'deepseek_v41', found model_type 'llama'" in refused(
        "inspect", tmp_path, code=3
    )


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("layers.N.attn.wq_a", "layers.N.attn.wq_a"),
        ("attn.wq_a.weight", "layers.N.attn.wq_a"),
        ("layers.3.ffn.experts.E.w1.weight", "layers.3.ffn.experts.w1"),
        ("ffn.experts.7.w2.weight", "layers.N.ffn.experts.w2"),
        ("mtp.N.e_proj", "mtp.N.e_proj"),
        ("self_attn.q_a_proj.weight", "layers.N.attn.wq_a"),
    ],
)
def test_a_name_with_open_numbers_shows_its_row(name: str, path: str) -> None:
    result = CliRunner().invoke(app, ["names", name])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == path


def test_a_missing_golden_says_how_to_get_one(there: dict[str, Path], tmp_path: Path) -> None:
    said = refused("parity", there["orbax"], "--golden", tmp_path / "nope", code=3)
    assert f"dsv4 golden record SOURCE --out {tmp_path / 'nope'} --random 300" in said


@pytest.mark.parametrize(("command", "extra"), [(("golden", "record"), "[reference]"), (("compile",), "[tpu]")])
def test_help_shows_the_extra_that_is_needed(command: tuple[str, ...], extra: str) -> None:
    shown = " ".join(CliRunner().invoke(app, [*command, "--help"]).stdout.replace("│", " ").split())
    assert f"pip install 'dsv4-convert{extra}'" in shown
