"""``dsv4 push`` with the real client against a Hub: what arrives, what is kept, what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from dsv4_convert.cli import app
from dsv4_convert.convert import ConversionOptions, hf_to_orbax
from dsv4_convert.golden.archive import open_golden
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint

from .hub_server import LoopbackHub

# The client's own upload of large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

GOLDEN = Path(__file__).parents[2] / "golden" / "data" / "tiny"
TOKEN = "hf_" + "a" * 34
REPO = "org/tiny-orbax"


@pytest.fixture(scope="module")
def orbax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    write_checkpoint(folder / "hf", tiny_config(num_hidden_layers=1, num_hash_layers=0, compress_ratios=[0]), mtp=False)
    hf_to_orbax(folder / "hf", folder / "orbax", options=ConversionOptions(name="deepseek-ai/DeepSeek-V4-Flash"))
    (folder / "orbax" / "notes.txt").write_text("mine")
    return folder / "orbax"


@pytest.fixture
def writable(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.required_token = TOKEN
    return hub


def push(*words: object, code: int = 0) -> str:
    result: Result = CliRunner().invoke(app, ["push", *map(str, words)])
    assert result.exit_code == code, result.output
    assert TOKEN not in result.output
    return " ".join(result.output.split())


def arrived(hub: LoopbackHub, repo: str, branch: str = "main") -> dict[str, bytes]:
    return {name: file.content for name, file in hub.commits[repo][hub.branches[repo][branch]].items()}


def header(card: bytes) -> dict[str, object]:
    """As the Hub reads it."""
    _, text, _ = card.decode().split("---\n", 2)
    found = yaml.safe_load(text)
    assert isinstance(found, dict)
    return found


def test_a_checkpoint_arrives_whole_and_without_what_is_not_of_it(writable: LoopbackHub, orbax: Path) -> None:
    out = push(orbax, REPO, "--private")
    files = arrived(writable, REPO)
    card = files.pop("README.md")
    here = {file.relative_to(orbax).as_posix() for file in orbax.rglob("*") if file.is_file()}
    assert set(files) == here - {"notes.txt"}
    for name, content in files.items():
        assert content == (orbax / name).read_bytes(), name
    asked = writable.made[REPO]
    assert asked.get("private") is True or asked.get("visibility") == "private"
    assert header(card)["base_model"] == "deepseek-ai/DeepSeek-V4-Flash"
    for word in ("revision", "bfloat16", "dsv4 verify", REPO):
        assert word in card.decode()
    assert f"to the model {REPO}" in out
    assert {path.name for path in orbax.parent.iterdir()} == {"hf", "orbax"}
    assert not (orbax / ".cache").exists()


def test_a_golden_is_read_from_where_it_was_pushed(writable: LoopbackHub) -> None:
    push(GOLDEN, "org/golden")
    files = arrived(writable, "datasets/org/golden")
    assert "golden" in header(files["README.md"])["tags"]  # type: ignore[operator]
    there = open_golden("hf://datasets/org/golden")
    assert there.manifest == open_golden(GOLDEN).manifest
    assert not there.verify()
    assert "hf://datasets/org/golden" in files["README.md"].decode()


def test_a_readme_is_not_overwritten(writable: LoopbackHub) -> None:
    writable.add("datasets/org/golden", "1" * 40, {"README.md": b"by hand", "other": b"kept"})
    assert "README.md is kept" in push(GOLDEN, "org/golden")
    assert arrived(writable, "datasets/org/golden")["README.md"] == b"by hand"
    push(GOLDEN, "org/golden", "--replace-readme")
    files = arrived(writable, "datasets/org/golden")
    assert b"by hand" not in files["README.md"]
    assert files["other"] == b"kept"


def test_an_interrupted_push_goes_on(writable: LoopbackHub) -> None:
    """The last request of a push fails; the same command sends what is missing."""
    writable.failures["/commit/"] = 403
    push(GOLDEN, "org/golden", code=3)
    assert not arrived(writable, "datasets/org/golden")
    writable.failures.clear()
    push(GOLDEN, "org/golden")
    assert arrived(writable, "datasets/org/golden").keys() == {file.name for file in GOLDEN.iterdir()} | {"README.md"}


def test_a_dry_run_sends_nothing(hub: LoopbackHub, orbax: Path) -> None:
    result = CliRunner().invoke(app, ["push", str(orbax), REPO, "--dry-run", "--json", "-"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert not hub.requests
    assert sum(file["size"] for file in document["files"]) == sum(
        (orbax / file["name"]).stat().st_size for file in document["files"]
    )
    assert (document["kind"], document["pushed"]) == ("model", None)
    assert header(document["card"].encode())["library_name"] == "jax"


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda hub, patch: patch.delenv("HF_TOKEN"), 3, "a token with write access"),
        (lambda hub, patch: patch.setenv("HF_TOKEN", "hf_other"), 3, "a token with write access"),
        (lambda hub, patch: patch.setenv("HF_TOKEN", "hf_ä"), 2, "the access token has characters"),
        (lambda hub, patch: hub.failures.update({"/api/repos/create": 403}), 3, "a token with write access"),
        (lambda hub, patch: hub.failures.update({"/upload/": 500}), 4, "run the same command again"),
    ],
)
def test_what_the_hub_refuses(
    writable: LoopbackHub,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[LoopbackHub, pytest.MonkeyPatch], None],
    code: int,
    words: str,
) -> None:
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda _: None)
    change(writable, monkeypatch)
    out = push(GOLDEN, "org/golden", code=code)
    assert words in out
    assert hashlib.sha256(TOKEN.encode()).hexdigest() not in out


def test_what_is_not_pushed(writable: LoopbackHub, orbax: Path, tmp_path: Path) -> None:
    assert "dsv4 push takes a golden or a converted checkpoint" in push(orbax.parent / "hf", REPO, code=2)
    assert "expected a local folder" in push("gs://bucket/orbax", REPO, code=2)
    assert "expected a local folder" in push(tmp_path / "nothing", REPO, code=2)
    assert "is not a repository name" in push(GOLDEN, "no/such/name", code=2)
    assert "no revision 'v9'" in push(GOLDEN, "org/golden", "--revision", "v9", code=3)
