"""The user, the password and the signature of a URL are sent to its server, and shown nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsv4_convert.cli import app
from dsv4_convert.convert import hf_to_orbax
from dsv4_convert.files import remote
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.show.urls import without_secrets

from ..golden.test_remote import COMMITTED, Server, serving

SECRETS = ("user7", "pass7", "signature7", "fragment7")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "WAITS", ())
    with serving(tmp_path / "served") as running:
        yield running


@pytest.fixture
def url(server: Server) -> str:
    return f"http://user7:pass7@127.0.0.1:{server.server_port}/golden?sig=signature7&x='a'#fragment7"


@pytest.fixture(scope="module")
def orbax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secrets")
    write_checkpoint(folder / "hf", tiny_config(), seed=0)
    hf_to_orbax(folder / "hf", folder / "orbax")
    return folder / "orbax"


def said(folder: Path, *words: object) -> tuple[int, str]:
    """The exit code, and everything that a command prints or writes below ``folder``."""
    folder.mkdir(exist_ok=True)
    result = CliRunner().invoke(app, list(map(str, words)))
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".safetensors"]
    return result.exit_code, result.output + "".join(file.read_text(encoding="utf-8") for file in files)


def check(text: str) -> None:
    assert "127.0.0.1" in text
    assert not [secret for secret in SECRETS if secret in text]


REPORTS = ("--report", "{out}/report.html", "--junit", "{out}/report.xml")
COMMANDS = {
    "show": ("golden", "show", "{url}"),
    "verify": ("golden", "verify", "{url}"),
    "diff": ("golden", "diff", "{url}", "{url}"),
    "inspect": ("inspect", "{url}"),
    "parity": ("parity", "{orbax}", "--golden", "{url}", "--layer", "1", "-vv", *REPORTS),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_succeeds(url: str, orbax: Path, tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    words = [word.format(url=url, orbax=orbax, out=out) for word in COMMANDS[command]]
    code, text = said(out, *words, "--json", out / "result.json")
    assert code == 0, text
    check(text if command not in ("show", "diff") else f"127.0.0.1 {text}")  # which do not say where it is


NOT_READ = [(command, "damaged") for command in ("show", "diff", "inspect")] + [("diff", "cut short")]


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (command, what)
        for command in COMMANDS
        for what in ("nothing there", "refused", "failing", "damaged", "cut short", "nobody there")
        if (command, what) not in NOT_READ
    ],
)
def test_a_command_that_fails(server: Server, url: str, orbax: Path, tmp_path: Path, command: str, what: str) -> None:
    for file in list(server.root.iterdir()):
        if what == "nothing there":
            file.unlink()
        elif what == "damaged" and file.suffix == ".safetensors":
            content = bytearray(file.read_bytes())
            content[-4000:] = bytes(4000)
            file.write_bytes(content)
        elif what == "cut short" and file.suffix == ".safetensors":
            file.write_bytes(file.read_bytes()[:-10])
    server.failing = 1000 if what == "failing" else 0
    server.refusing = what == "refused"
    if what == "nobody there":
        url = url.replace(f":{server.server_port}/", ":9/")
    out = tmp_path / "out"
    words = [word.format(url=url, orbax=orbax, out=out) for word in COMMANDS[command]]
    code, text = said(out, *words, "--json", "-")
    assert code in (1, 3, 4), text
    check(text)


def test_a_checkpoint_in_a_bucket(orbax: Path, tmp_path: Path, bucket: dict[str, object]) -> None:
    """A URL that no bucket has; what is said of it is said without what it holds."""
    for words in (
        ("verify", "gs://user7:pass7@127.0.0.1/x"),
        ("verify", orbax, "--against", "s3://user7:pass7@127.0.0.1/x?sig=signature7"),
        ("inspect", "ftp://user7:pass7@127.0.0.1/x?sig=signature7"),
        ("convert", "hf-to-orbax", "s3://user7:pass7@127.0.0.1/x", tmp_path / "y"),
        ("parity", "--source", "nope://user7:pass7@127.0.0.1/x", "--golden", COMMITTED),
        ("golden", "record", "nope://user7:pass7@127.0.0.1/x", "--out", tmp_path / "y", "--tokens", "1"),
    ):
        code, text = said(tmp_path / "out", *words)
        assert code in (2, 3, 4), text
        check(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/golden?sig=1 --report x.html", "https://…@host/golden?… --report x.html"),
        ("'s3://me:p@ss:w@rd@host/a@b#token=x' ./a@b#c", "'s3://…@host/a@b#…' ./a@b#c"),
        ("hf://datasets/x/y@main/golden", "hf://datasets/x/y@main/golden"),
        ("https://host?sig=a@SECRET", "https://…"),
        ("https://me:p#ss@host/x?y", "https://…/x?…"),
        ("https://host/g?sig=ab'cd", "https://host/g?…"),
        ("no URL: a@b?c#d", "no URL: a@b?c#d"),
    ],
)
def test_one_function_shows_a_url(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
