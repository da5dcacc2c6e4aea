"""Output in a terminal: plain text on request, no line wider than the window, and progress."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer
from rich.console import Console
from rich.table import Column, Table
from typer import rich_utils
from typer.testing import CliRunner

from dsv4_convert.cli import app, ending, status
from dsv4_convert.errors import UsageError
from dsv4_convert.parity.detail import Detail
from dsv4_convert.parity.report.data import ParityReport
from dsv4_convert.parity.report.tables import Verbosity, render
from dsv4_convert.show.compiling import COMPILING, listen
from dsv4_convert.show.tables import fitted
from dsv4_convert.show.units import clock
from dsv4_convert.spec.taps import TapKey

from .samples import samples

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "golden" / "data" / "tiny"
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def in_terminal(*arguments: str | Path, columns: int, **environment: str) -> str:
    """Everything that a dsv4 command writes to a terminal of so many columns."""
    command = [sys.executable, "-m", "dsv4_convert", *map(str, arguments)]
    return in_terminal_of(command, columns=columns, **environment)


def in_terminal_of(command: Sequence[str], *, columns: int, **environment: str) -> str:
    """Everything that a command writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    clean = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "TERM")}
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=clean | {"TERM": "xterm-256color"} | environment,
        cwd=ROOT,
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # Linux says so where macOS gives nothing
            break
        if not piece:
            break
        written += piece
    os.close(ours)
    process.wait()
    return written.decode()


def shown(written: str) -> list[str]:
    """The lines that stay."""
    return [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in _ESCAPE.sub("", written).split("\n")]


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["colour", "NO_COLOR", "dumb"])
def test_escape_codes_only_where_they_are_wanted(environment: dict[str, str]) -> None:
    written = in_terminal("inspect", GOLDEN, columns=50, **environment)
    assert ("\x1b" in written) == (not environment)
    lines = shown(written)
    assert "attention  SCHC M" in lines
    assert max(map(len, lines)) <= 50


def test_an_error_and_a_help_are_plain_where_that_is_wanted() -> None:
    wrong = in_terminal("names", "attn.wqa", columns=50, NO_COLOR="1")
    assert "\x1b" not in wrong
    assert max(map(len, shown(wrong))) <= 50
    assert "layers.N.attn.wq_a" in wrong
    assert "\x1b" not in in_terminal("golden", "--help", columns=50, NO_COLOR="1")
    assert "\x1b[31m" in in_terminal("names", "attn.wqa", columns=50)


def test_pipes_get_text_alone() -> None:
    """Also where the environment says that there is a terminal."""
    result = CliRunner(env={"TERM": "xterm-256color"}).invoke(app, ["inspect", str(GOLDEN)])
    assert result.exit_code == 0
    assert "\x1b" not in result.output
    assert re.fullmatch(r"(took +\d+ s\n)?", result.stderr)


@pytest.mark.parametrize("width", [80, 50])
def test_parity_tables_fit_and_lose_columns_not_letters(width: int) -> None:
    longest = "layers.60.attn.indexer.compressor.entries"
    (report, *_) = samples(
        ParityReport, {Detail: None, ParityReport | None: None, str: longest, TapKey: TapKey.parse(longest)}
    )
    report = dataclasses.replace(report, phase=None, dtype="float32")
    for verbosity in (Verbosity.TABLES, Verbosity.EVERYTHING):
        written = io.StringIO()
        render(report, Console(file=written, width=width), verbosity=verbosity)
        lines = written.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        assert "attn.indexer.compressor.entries" in written.getvalue()
        assert "…" not in written.getvalue()
        assert ("1-cos" in written.getvalue()) == (width == 80 and verbosity is Verbosity.EVERYTHING)


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_what_is_left_of_a_table_is_whole(lost: int) -> None:
    """In the narrowest window that it fits into, whichever columns it lost."""
    headers = [f"column {number}" for number in range(6)]

    def table(names: list[str]) -> Table:
        made = Table(*(Column(name, no_wrap=True) for name in names), box=None, pad_edge=False)
        made.add_row(*(f"{name}: 1.5e+00" for name in names))
        return made

    def printed(what: Table, console: Console) -> str:
        console.print(what)
        return str(console.file.getvalue())  # type: ignore[attr-defined]

    left = headers[:1] + headers[1 + lost :]
    expected = printed(table(left), Console(file=io.StringIO(), width=200)).splitlines()
    console = Console(file=io.StringIO(), width=max(len(line.rstrip()) for line in expected))
    found = printed(fitted(table(headers), console, dispensable=headers[1:]), console).splitlines()
    assert [line.rstrip() for line in found] == [line.rstrip() for line in expected]


def test_a_table_without_columns_to_lose_folds() -> None:
    table = Table("name", "number", box=None)
    table.columns[0].no_wrap = True
    table.add_row("a" * 30, "1")
    written = io.StringIO()
    console = Console(file=written, width=20)
    console.print(fitted(table, console, dispensable=("number",)))
    assert written.getvalue().count("a") == 30 + 1
    assert "number" not in written.getvalue()
    assert max(map(len, written.getvalue().splitlines())) <= 20


@pytest.mark.parametrize(("terminal", "every"), [(True, 2.0), (False, 30.0)])
def test_progress_without_escape_codes_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool, every: float
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(status, "console", lambda **_: Console(stderr=True, force_terminal=terminal))
    now = 0.0
    monkeypatch.setattr(status.time, "monotonic", lambda: now)
    with status.byte_progress("verifying") as progress, status.status("plan") as say:
        for step in range(1, 41):
            now = float(step)
            progress(step * 1000, 40_000, "norm")
        now += every
        say("headers")
    lines = capsys.readouterr().err.splitlines()
    times = f"{clock(every)} elapsed, {clock(40 - every)} left"
    assert lines[0] == f"verifying: norm, {every:.1f} kB of 40.0 kB, {times}"
    assert len(lines) == 40 // every + 1
    assert lines[-1] == f"plan: headers, {clock(now)} elapsed"


def test_a_status_says_how_long_it_took_and_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(status.time, "monotonic", lambda: now)
    with status.status("parity") as say:
        say.step(0, 43, "layer 0 of 43")
        assert say.line == "parity: layer 0 of 43"
        say.note = "compiling, once"
        now += 30  # the first step compiles, so it tells nothing about the others
        assert say.line == "parity: layer 0 of 43, compiling, once, 0:30 elapsed"
        say.note = ""
        say.step(1, 43, "layer 1 of 43")
        assert say.line == "parity: layer 1 of 43, 0:30 elapsed"
        now += 22
        say.step(12, 43, "layer 12 of 43")
        assert say.line == "parity: layer 12 of 43, 0:52 elapsed, 1:02 left"


def test_numba_tells_when_it_compiles() -> None:
    """With functions that the function calls; a bar and a status both show it, and what is in the cache is silent."""
    import numba

    from dsv4_convert.formats import kernels

    assert kernels.TILE
    heard: list[tuple[str, str]] = []
    with status.status("plan") as say:
        bar = status.what_column()
        with status.noting_compilations(bar):
            listen(lambda note: heard.append((say.note, bar.note)))
            inner = numba.njit(lambda number: number + 1)
            outer = numba.njit(lambda number: inner(number) * 2)
            assert outer(3) == 8
            first = len(heard)
            assert outer(4) == 10
    assert heard[0] == (COMPILING, COMPILING)
    assert heard[-1] == ("", "")
    assert heard[:-1] == [(COMPILING, COMPILING)] * (first - 1)
    assert len(heard) == first


def test_a_plan_is_not_printed_into_the_status() -> None:
    """Both go to the terminal, the plan on lines of its own."""
    program = (
        "import time\nfrom dsv4_convert.cli.status import status\nwith status('recording') as say:\n"
        "    say('reading headers'); time.sleep(0.3); say.print('reads   207.0 kB'); time.sleep(0.3)\n"
    )
    lines = shown(in_terminal_of([sys.executable, "-c", program], columns=80))
    assert "reads   207.0 kB" in [line.strip() for line in lines]


def test_the_last_lines_name_what_was_written_and_the_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    now = 0.0
    monkeypatch.setattr(ending.time, "monotonic", lambda: now)

    def run(seconds: float, error: Exception | None, *files: Path) -> None:
        nonlocal now
        with ending.ending():
            for file in files:
                ending.wrote("report", file)
            now += seconds
            if error is not None:
                raise error

    with pytest.raises(typer.Exit):
        run(72, typer.Exit(1), tmp_path / "a b.html")
    run(0.9, None)
    with pytest.raises(UsageError):
        run(9, UsageError("an error says nothing of its time"))
    assert capsys.readouterr().err == f"report  file://{tmp_path}/a%20b.html\ntook    0:01:12\n"


def test_a_bug_says_that_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv4_convert.spec import names

    def broken(table: object, name: str) -> None:
        secret = "hf_" + "secret"
        raise ZeroDivisionError(len(secret))

    monkeypatch.setattr(names.NameTable, "explain", broken)
    result = CliRunner().invoke(app, ["names", "norm"])
    assert result.exit_code == 70
    assert "ZeroDivisionError: 9" in result.stderr
    assert "this is a bug in dsv4" in result.stderr
    assert "dsv4 doctor --json -" in result.stderr
    assert "hf_secret" not in result.output


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: 3 GiB on TPU_0")])
def test_too_little_memory_is_no_bug(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    from dsv4_convert.spec import names

    def starved(table: object, name: str) -> None:
        raise error

    monkeypatch.setattr(names.NameTable, "explain", starved)
    result = CliRunner().invoke(app, ["names", "norm"])
    assert result.exit_code == 4
    assert result.stderr.startswith("error: not enough memory: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["veify"], "Did you mean 'verify'?"),
        (["verify", "x", "--agains", "y"], "--against"),
        (["names", "attn.wqa"], "layers.N.attn.wq_a"),
        (["names", "mtp.0.e_porj"], "mtp.N.e_proj"),
        (["convert", "hf-to-orbax", "{hf}", "x", "--dtype", "bf16"], "did you mean bfloat16?"),
        (["compile", "--config", "{config}", "--topology", "v5-512"], "did you mean v5p-512?"),
        (["compile", "--config", "{config}", "--find-mesh", "v5"], "did you mean v5"),
        (["compile", "--config", "{config}", "--topology", "v5p-8", "--mesh", "tensr=4"], "did you mean tensor?"),
        (["generate", "x", "--platform", "gpus"], "did you mean gpu?"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_it_says_what_may_have_been_meant(arguments: list[str], meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # typer reads GITHUB_ACTIONS and similar variables on import, and then puts colour codes between the letters.
    monkeypatch.setattr(rich_utils, "COLOR_SYSTEM", None)
    monkeypatch.setattr(rich_utils, "FORCE_TERMINAL", False)
    config = ROOT / "tests" / "data" / "configs" / "DeepSeek-V4-Flash.json"
    result = CliRunner().invoke(app, [word.format(config=config, hf=GOLDEN) for word in arguments])
    assert result.exit_code == 2
    assert meant in " ".join(result.stderr.replace("│", " ").split())


def test_layers_that_a_model_has_not() -> None:
    from dsv4_convert.golden.synthetic import tiny_config
    from dsv4_convert.spec.config import Config
    from dsv4_convert.spec.names import check_layers

    with pytest.raises(UsageError, match="layers 5, 7-8: this model has the layers 0 to 3"):
        check_layers(Config.from_hf(tiny_config()), [1, 5, 7, 8])
