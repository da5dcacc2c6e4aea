"""The commands as a person or a script meets them: output streams, exit codes, messages, help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsv4_convert.cli import app
from dsv4_convert.cli.common import parse_layers, parse_layers_and_stages
from dsv4_convert.errors import UsageError
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.show.units import size
from golden.archive import open_golden

GOLDEN = Path(__file__).parents[2] / "golden" / "data" / "tiny"
COMMANDS = (
    ["convert", "hf-to-orbax"],
    ["convert", "orbax-to-hf"],
    ["download"],
    ["verify"],
    ["golden", "record"],
    ["golden", "show"],
    ["golden", "verify"],
    ["golden", "diff"],
    ["golden", "make-checkpoint"],
    ["parity"],
    ["names"],
)


def dsv4(*arguments: str | Path, exit_code: int = 0) -> tuple[str, str]:
    """Run a command in this process; its stdout and stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "hf"
    write_checkpoint(folder, tiny_config(), seed=0)
    return folder


@pytest.fixture(scope="module")
def orbax(hf: Path) -> Path:
    dsv4("convert", "hf-to-orbax", hf, hf.parent / "orbax")
    return hf.parent / "orbax"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_a_help_that_teaches(command: list[str]) -> None:
    out, _ = dsv4(*command, "--help")
    assert "Usage:" in out
    assert "--json" in out
    assert len(out.splitlines()) > 5


def test_convert_says_what_it_will_do_and_what_it_did(hf: Path, tmp_path: Path) -> None:
    out, err = dsv4("convert", "hf-to-orbax", hf, tmp_path / "orbax", "--dtype", "source")
    assert "reads   367 tensors" in err
    assert "drops" not in err
    assert "217 leaves" in out
    assert str(tmp_path / "orbax") in out


def test_json_alone_on_stdout(hf: Path, tmp_path: Path) -> None:
    out, _ = dsv4("convert", "hf-to-orbax", hf, tmp_path / "orbax", "--json", "-")
    document = json.loads(out)
    assert document["schema_version"] == 1
    assert document["tensors"] == 367
    assert sum(document["read"].values()) < sum(document["written"].values())


def test_a_dry_run_writes_nothing(hf: Path, tmp_path: Path) -> None:
    _, err = dsv4("convert", "hf-to-orbax", hf, tmp_path / "orbax", "--dry-run")
    assert "writes" in err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (
            ["convert", "hf-to-orbax", "{hf}", "{tmp}/x", "--dtype", "int8"],
            2,
            "expected one of bfloat16, float32, source",
        ),
        (["convert", "hf-to-orbax", "{hf}", "{tmp}/x", "--layers", "3-1"], 2, "expected numbers and ranges"),
        (["convert", "hf-to-orbax", "{hf}", "{tmp}/x", "--layers", "7"], 2, "this model has the layers 0 to 3"),
        (["convert", "hf-to-orbax", "{hf}", "{hf}"], 2, "exists already"),
        (["convert", "hf-to-orbax", "{tmp}/nothing", "{tmp}/x"], 3, "no such folder"),
        (["convert", "hf-to-orbax", "{tmp}", "{tmp}/x"], 3, "config.json"),
        (["convert", "hf-to-orbax", "{hf}", "{tmp}/x", "--revision", "main"], 2, "is a local folder"),
        (["verify", "{tmp}"], 3, "{tmp}"),
        (["parity", "{orbax}", "--golden", "{tmp}"], 3, "{tmp}"),
        (["parity", "{orbax}", "--golden", "{golden}", "--mode", "all"], 2, "one of isolated, cumulative, both"),
        (["parity", "{orbax}", "--golden", "{golden}", "--dtype", "float16"], 2, "expected one of float32, bfloat16"),
        (["parity", "{orbax}", "--golden", "{golden}", "--tokenizer", "{orbax}"], 3, "tokenizer.json: no such file"),
        (["parity", "{orbax}", "--golden", "{golden}", "--layer", "12"], 2, "layers 0 to 3"),
        (
            ["parity", "{orbax}", "--golden", "{golden}", "--taps", "attn.wq_c"],
            2,
            "matches no tap of this run; close ones: attn.wq_b, attn.wq_a",
        ),
        (["names", "layers.3.attn.wq_c.weight"], 2, "not a tensor or parameter"),
        (["golden", "make-checkpoint", "{hf}"], 2, "exists already"),
        (["parity"], 2, "a golden is needed"),
        (["parity", "--golden", "{golden}"], 2, "expected a converted CHECKPOINT, or --source"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_errors_have_a_code_a_message_and_no_traceback(
    hf: Path, orbax: Path, tmp_path: Path, arguments: list[str], exit_code: int, message: str
) -> None:
    names = {"hf": hf, "orbax": orbax, "tmp": tmp_path, "golden": GOLDEN}
    out, err = dsv4(*(argument.format(**names) for argument in arguments), exit_code=exit_code)
    assert message.format(**names) in " ".join(err.split())
    assert "Traceback" not in out + err
    assert not (tmp_path / "x").exists()


def test_parity_passes_and_reports(orbax: Path, tmp_path: Path) -> None:
    out, _ = dsv4("parity", orbax, "--golden", GOLDEN, "--layer", "2", "-vv", "--json", tmp_path / "report.json")
    assert "PASS: all" in out
    assert "attn.wq_a" in out
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == "pass"


def test_parity_of_another_model_fails_with_1_and_names_the_tap(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config(), seed=1)
    dsv4("convert", "hf-to-orbax", tmp_path / "hf", tmp_path / "orbax")
    out, _ = dsv4("parity", tmp_path / "orbax", "--golden", GOLDEN, "--program", "streamed", exit_code=1)
    assert "FAIL" in out
    assert "embed is the first tap that diverges" in " ".join(out.split())


def test_parity_in_both_modes_explained_and_as_json(hf: Path, tmp_path: Path) -> None:
    dsv4("convert", "hf-to-orbax", hf, tmp_path / "orbax")
    options = (
        "--mode",
        "both",
        "--dtype",
        "bfloat16",
        "--program",
        "streamed",
        "--require-reach",
        "--against",
        hf,
        "--json",
        tmp_path / "report.json",
    )
    out, _ = dsv4("parity", tmp_path / "orbax", "--golden", GOLDEN, "-v", *options)
    words = " ".join(out.split())
    assert "error of the streams that leave each layer" in words
    assert "next token at 300 positions" in words
    assert "PASS: all 324 taps agree" in words
    document = json.loads((tmp_path / "report.json").read_text())
    assert (document["dtype"], document["modes"]) == ("bfloat16", ["isolated", "cumulative"])
    out, _ = dsv4("parity", tmp_path / "orbax", "--golden", GOLDEN, "--layer", "2", "--taps", "attn.q", "--explain")
    assert "In float32 rounding moves the reference itself" in " ".join(out.split())


def test_goldens_are_compared(hf: Path, tmp_path: Path) -> None:
    out, _ = dsv4("golden", "diff", GOLDEN, GOLDEN, "--json", tmp_path / "diff.json")
    assert "164 taps are equal, 0 differ within the noise floor, 0 beyond it" in out
    assert json.loads((tmp_path / "diff.json").read_text())["beyond_noise"] == []
    write_checkpoint(tmp_path / "hf", tiny_config(), seed=1)
    dsv4("golden", "record", tmp_path / "hf", "--out", tmp_path / "other", "--random", "300", "--seed", "6")
    out, err = dsv4("golden", "diff", GOLDEN, tmp_path / "other", exit_code=1)
    assert "source.files" in out
    assert "embed: " in out
    assert "differ beyond the noise floor" in err


def test_verify_finds_a_flipped_bit(hf: Path, tmp_path: Path) -> None:
    dsv4("convert", "hf-to-orbax", hf, tmp_path / "orbax")
    out, _ = dsv4("verify", tmp_path / "orbax")
    assert "every byte as written" in out
    chunk = tmp_path / "orbax" / "layers.2.attn.wq_b" / "0.0"
    content = bytearray(chunk.read_bytes())
    content[100] ^= 1
    chunk.write_bytes(content)
    _, err = dsv4("verify", tmp_path / "orbax", exit_code=1)
    assert "layers.2.attn.wq_b" in err


def test_names_explains_in_every_spelling() -> None:
    out, _ = dsv4("names", "model.layers.5.self_attn.kv_norm.weight")
    assert "layers.5.attn.kv_norm.weight" in out
    assert "model.layers.5.attn.norm.weight" in out
    out, _ = dsv4("names", "mtp.0.e_proj.weight")
    assert "published     mtp.0.e_proj.weight" in out
    assert "linear, in mtp stages" in out
    out, _ = dsv4("names", "mtp.0.main_proj.weight")
    assert "linear, in first DSpark stages" in out
    out, _ = dsv4("names")
    assert "in the draft stages, below mtp.N." in out
    out, _ = dsv4("names", "--json", "-")
    assert len(json.loads(out)["names"]) > 40


def test_the_golden_says_what_it_is() -> None:
    out, _ = dsv4("golden", "show", GOLDEN)
    assert "transformers" in out
    rows = [line.split("  ") for line in out.splitlines()]
    shapes = {(row[0], cell.strip()) for row in rows for cell in row[1:]}
    opened = open_golden(GOLDEN)
    assert all((key.tap.name, str(list(opened.read(key).shape))) in shapes for key in opened.keys)
    out, _ = dsv4("golden", "verify", GOLDEN)
    assert "every byte as recorded" in out


def test_parse_layers() -> None:
    assert parse_layers("0-3,7,2") == (0, 1, 2, 3, 7)
    assert parse_layers(" 12 ") == (12,)
    assert parse_layers("all") is None
    for wrong in ("", "a", "-1", "3-", "1,,2", "１", "0-99999999999", "9" * 5000):
        with pytest.raises(UsageError):
            parse_layers(wrong)
    assert parse_layers_and_stages("7, mtp.0-1,0-1") == (7, "mtp.0", "mtp.1", 0, 1)
    for wrong in ("mtp", "mtp.", "mtp.x", "mtp.0-mtp.1", ""):
        with pytest.raises(UsageError):
            parse_layers_and_stages(wrong)


def test_size() -> None:
    assert [size(n) for n in (0, 999, 1000, 159_609_485_896)] == ["0 B", "999 B", "1.0 kB", "159.6 GB"]


def test_the_installed_command_is_there() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "dsv4_convert", "--version"], capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines()[0] == "0.1.0"


def test_an_interrupt_says_how_to_go_on(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv4_convert import convert

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "carry_out", interrupted)
    _, err = dsv4("convert", "hf-to-orbax", hf, tmp_path / "orbax", exit_code=130)
    assert "same command" in err


def test_json_goes_to_a_pipe(tmp_path: Path) -> None:
    """Behind /dev/stdout and what the shell makes of ``>(command)`` there is no path."""
    read, write = os.pipe()
    dsv4("names", "layers.3.attn.wq_a", "--json", f"/dev/fd/{write}")
    os.close(write)
    with open(read, encoding="utf-8") as stream:
        assert json.load(stream)["schema_version"] == 1


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "hf-to-orbax", "{none}", "{none}"),
        ("convert", "orbax-to-hf", "{none}", "{none}"),
        ("golden", "show", "{none}"),
        ("names",),
        ("doctor", "--offline"),
    ],
    ids=" ".join,
)
def test_where_json_cannot_go_is_told_before_the_work(tmp_path: Path, words: tuple[str, ...]) -> None:
    given = [word.format(none=tmp_path / "none") for word in words]
    out, err = dsv4(*given, "--json", tmp_path / "gone" / "x.json", exit_code=2)
    assert f"--json {tmp_path / 'gone' / 'x.json'}: cannot be written (there is no folder" in err
    assert not out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_disk_that_refuses_a_result_is_a_matter_of_resources(tmp_path: Path) -> None:
    _, err = dsv4("names", "head", "--json", "/dev/full", exit_code=4)
    assert "--json /dev/full: cannot write: No space left on device" in err
