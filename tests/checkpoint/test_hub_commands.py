"""The commands with a repository: the real client in processes of their own, against the loopback Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint

from .hub_server import LoopbackHub

REPO, COMMIT, TOKEN = "acme/DeepSeek-V4-Tiny", "ab" * 20, "hf_secretsecret"


@pytest.fixture
def served(hub: LoopbackHub, tmp_path: Path) -> LoopbackHub:
    """The demo's checkpoint as a repository."""
    write_checkpoint(tmp_path / "source", tiny_config(), seed=0)
    hub.add(REPO, COMMIT, {file.name: file.read_bytes() for file in (tmp_path / "source").iterdir()})
    return hub


def dsv4(
    hub: LoopbackHub, tmp_path: Path, *arguments: str | Path, code: int = 0, **environment: str
) -> tuple[str, str]:
    """Run a command with an empty cache; its stdout and stderr."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    process = subprocess.run(
        [sys.executable, "-m", "dsv4_convert", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=clean
        | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        | environment,
    )
    assert process.returncode == code, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    return process.stdout, process.stderr


def test_convert_from_a_repository(served: LoopbackHub, tmp_path: Path) -> None:
    from dsv4_convert.store import open_store

    dsv4(served, tmp_path, "convert", "hf-to-orbax", REPO, tmp_path / "orbax")
    dsv4(served, tmp_path, "convert", "hf-to-orbax", tmp_path / "source", tmp_path / "local")
    ours, local = open_store(tmp_path / "orbax"), open_store(tmp_path / "local")
    assert {path: record.digest for path, record in ours.manifest.leaves.items()} == {
        path: record.digest for path, record in local.manifest.leaves.items()
    }
    assert ours.metadata["source"]["name"] == REPO
    assert ours.metadata["source"]["revision"] == COMMIT


def test_only_the_shards_of_the_chosen_layers_are_fetched(served: LoopbackHub, tmp_path: Path) -> None:
    out, _ = dsv4(served, tmp_path, "download", REPO, "--layers", "2", "--dry-run", "--json", "-")
    plan = json.loads(out)
    assert plan["revision"] == COMMIT
    assert not any(name.endswith(".safetensors") for name in served.fetched())
    dsv4(served, tmp_path, "convert", "hf-to-orbax", REPO, tmp_path / "orbax", "--layers", "2")
    # The embedding, layer 2, the head; neither other layers nor the speculative stage.
    wanted = {f"model-{number:05d}-of-00007.safetensors" for number in (1, 4, 6)}
    assert {file["name"] for file in plan["files"] if file["name"].endswith(".safetensors")} == wanted
    assert {name for name in served.fetched() if name.endswith(".safetensors")} == wanted


def test_download_then_offline(served: LoopbackHub, tmp_path: Path) -> None:
    out, _ = dsv4(served, tmp_path, "download", REPO)
    folder = Path(out.strip())
    assert (folder / "config.json").is_file()
    served.failures["/"] = 500
    dsv4(served, tmp_path, "convert", "hf-to-orbax", REPO, tmp_path / "orbax", HF_HUB_OFFLINE="1")
    dsv4(served, tmp_path, "convert", "hf-to-orbax", folder, tmp_path / "again", HF_HUB_OFFLINE="1")


def test_wrong_content_of_the_right_size_is_refused(served: LoopbackHub, tmp_path: Path) -> None:
    file = next(file for name, file in served.commits[REPO][COMMIT].items() if name.startswith("model-00003"))
    damaged = bytearray(file.content)
    damaged[-1] ^= 1
    file.sent = bytes(damaged)
    _, err = dsv4(served, tmp_path, "convert", "hf-to-orbax", REPO, tmp_path / "orbax", code=3)
    assert "model-00003-of-00007.safetensors: expected sha256" in err
    assert not (tmp_path / "orbax").exists()


def test_private_repositories_and_tokens(served: LoopbackHub, tmp_path: Path) -> None:
    served.required_token = TOKEN
    _, err = dsv4(served, tmp_path, "download", REPO, code=3)
    assert "HF_TOKEN" in err
    out, err = dsv4(served, tmp_path, "download", REPO, HF_TOKEN=TOKEN)
    assert TOKEN not in out + err


def test_an_unknown_repository(served: LoopbackHub, tmp_path: Path) -> None:
    _, err = dsv4(served, tmp_path, "download", "acme/nothing", code=3)
    assert "acme/nothing" in err
