"""The conversion command as a person and a script meet it: plan, refusals, progress, options that belong together."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from typer.testing import CliRunner

from dsv4_convert.cli import app, progress
from dsv4_convert.cli.common import parse_bytes
from dsv4_convert.convert import Advance
from dsv4_convert.errors import ResourceError, UsageError
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.store import Processes, open_store
from dsv4_convert.store.processes import KeyValues


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conversion") / "hf"
    write_checkpoint(folder, tiny_config())
    return folder


def convert(*arguments: object, exit_code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["convert", "hf-to-orbax", *map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return result.stdout, result.stderr


def test_the_plan_fits_80_columns_and_says_everything(hf: Path, tmp_path: Path) -> None:
    _, err = convert(hf, tmp_path / "orbax", "--dry-run", "--layers", "1")
    lines = err.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [
        "source",
        "reads",
        "writes",
        "drops",
        "disk",
        "memory",
        "time",
    ]
    assert "drops   285 tensors: belongs to a layer that was not asked for" in err
    _, err = convert(hf, tmp_path / "orbax", "--dry-run")
    assert "drops" not in err
    assert not list(tmp_path.iterdir())


def test_what_cannot_fit_is_refused_before_anything_is_written(hf: Path, tmp_path: Path) -> None:
    _, err = convert(hf, tmp_path / "orbax", "--max-memory", "20MB", exit_code=4)
    assert "the conversion needs 0.15 GiB beside the interpreter, allowed are 0.02 GiB" in err
    assert "Raise --max-memory" in err
    assert not list(tmp_path.iterdir())


def test_it_says_what_was_rounded(hf: Path, tmp_path: Path) -> None:
    out, _ = convert(hf, tmp_path / "exact")
    assert "exact: none of 137,920 converted values is rounded" in out
    write_checkpoint(tmp_path / "base", tiny_config(), form="fp8")
    out, _ = convert(tmp_path / "base", tmp_path / "rounded")
    assert "rounded: " in out
    assert "the largest by 0.0038 of itself; --dtype float32 and source keep them exact" in out  # half a unit: 2^-8
    out, _ = convert(tmp_path / "base", tmp_path / "kept", "--dtype", "source")
    assert "exact: the published bytes" in out


def test_a_maxtext_user_gets_a_warning_before_and_a_line_after(hf: Path, tmp_path: Path) -> None:
    dest = tmp_path / "for maxtext"
    out, err = convert(hf, dest, "--layout", "maxtext-unscanned", "--json", tmp_path / "said.json")
    said = json.loads((tmp_path / "said.json").read_text())["maxtext"]
    assert "warns MaxText 0.2.5 computes other logits from these weights: no YaRN" in " ".join(err.split())
    assert max(len(line) for line in err.splitlines() if "file://" not in line) <= 80
    line = out.splitlines()[-1]
    assert line == said["command"]
    assert shlex.split(line)[-1] == f"load_parameters_path={dest}"
    assert "scan_layers=False" in shlex.split(line)
    assert Path(said["file"]) == dest / "maxtext.yml"
    assert Path(said["file"]).is_file()
    assert len(said["differences"]) == 3

    out, err = convert(hf, tmp_path / "dsv4", "--json", tmp_path / "said.json")
    assert "maxtext" not in (out + err).replace(str(tmp_path), "").lower()
    assert json.loads((tmp_path / "said.json").read_text())["maxtext"] is None


def test_zstd_is_a_choice(hf: Path, tmp_path: Path) -> None:
    convert(hf, tmp_path / "orbax", "--compression", "zstd")
    assert json.loads((tmp_path / "orbax" / "embed" / ".zarray").read_text())["compressor"]["id"] == "zstd"
    assert open_store(tmp_path / "orbax").read("embed").shape == (96, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compression", "gzip"], "--compression gzip: expected one of none, zstd"),
        (["--dtype", "fp8"], "--dtype fp8: expected one of bfloat16, float32, source"),
        (["--max-memory", "lots"], "--max-memory lots: expected a size such as 800MiB"),
        (["--num-processes", "2"], "need all of --coordinator"),
        (["--coordinator", "localhost:1", "--num-processes", "2", "--process-id", "2"], "need all of --coordinator"),
    ],
)
def test_wrong_options_are_refused(hf: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    _, err = convert(hf, tmp_path / "orbax", *arguments, exit_code=2)
    assert message in err


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1024", 1024), ("800MiB", 800 << 20), ("1.5 GB", 1_500_000_000), ("2G", 2_000_000_000), ("4kB", 4000)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_bytes("--max-memory", text) == nbytes
    with pytest.raises(UsageError):
        parse_bytes("--max-memory", text + "x")


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "GiB", "0", ""])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="expected a size"):
        parse_bytes("--max-memory", text)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rates_are_those_of_this_run() -> None:
    """The work of an interrupted run does not count as speed."""
    clock = Clock()
    meter = progress.SpeedMeter(clock)
    meter.reading(Advance(50, 100, 400, 800, ""))
    clock.now = 10.0
    reading = meter.reading(Advance(75, 100, 600, 800, "layers.3.attn.wq_a"))
    assert reading["read_rate"] == 2  # 2.5 to even
    assert reading["write_rate"] == 20
    assert reading["eta_seconds"] == 10
    assert reading["at"] == "layers.3.attn.wq_a"
    assert 10_000_000 < int(str(reading["memory_bytes"])) < 1 << 40
    sentence = progress._sentence(reading)
    assert sentence.startswith("layers.3  in 2 B/s  out 20 B/s  left 10 s  mem ")
    waiting = meter.reading(Advance(50, 100, 400, 800, "", fetched=1_500_000))
    assert waiting["fetched_bytes"] == 1_500_000
    assert progress._sentence(waiting) == "fetching, 1.5 MB so far"


def test_lines_of_json_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stderr = Clock(), io.StringIO()
    monkeypatch.setattr(progress.sys, "stderr", stderr)
    show = progress._lines(progress.SpeedMeter(clock))
    for second in range(0, 100, 5):
        clock.now = float(second)
        show(Advance(second, 100, second, 100, "embed"))
    events = [json.loads(line) for line in stderr.getvalue().splitlines()]
    assert [event["seconds"] for event in events] == [30, 60, 90]
    assert {event["event"] for event in events} == {"progress"}


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0 s"), (59, "59 s"), (61, "0:01:01"), (3661.4, "1:01:01")])
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_what_fails_before_the_first_step_is_told_to_the_other_processes(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, str] = {}
    service = SimpleNamespace(key_value_set=told.__setitem__)
    joined = Processes(index=0, count=2, service=cast(KeyValues, service))
    monkeypatch.setattr("dsv4_convert.cli.convert.join_processes", lambda *_: joined)

    def full(*_: object, **__: object) -> None:
        raise ResourceError("the disk is full")

    monkeypatch.setattr("dsv4_convert.convert.estimate", full)
    convert(hf, tmp_path / "orbax", exit_code=4)
    assert list(told.values()) == ["ResourceError: the disk is full"]
    convert(hf, tmp_path / "orbax", "--coordinator", "auto", "--json", tmp_path / "no" / "x", exit_code=2)
    assert "there is no folder" in list(told.values())[-1]
