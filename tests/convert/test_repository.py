"""From a repository to Orbax while its shards arrive: the real Hub client, against a Hub on the loopback interface."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dsv4_convert.checkpoint.hub_stream import open_repository
from dsv4_convert.checkpoint.streamed import AHEAD, StreamedCheckpoint
from dsv4_convert.cli import app
from dsv4_convert.convert import Advance, Storage, carry_out, hf_to_orbax, plan
from dsv4_convert.convert.against import compare_with_source
from dsv4_convert.convert.sources import read_sources
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.spec.config import Config
from dsv4_convert.store import open_store, verify

from ..checkpoint.hub_server import LoopbackHub

REPO, COMMIT = "org/tiny", "3" * 40


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository") / "hf"
    write_checkpoint(folder, tiny_config())
    return folder


@pytest.fixture
def served(hub: LoopbackHub, tiny: Path) -> Iterator[LoopbackHub]:
    hub.add(REPO, COMMIT, {file.name: file.read_bytes() for file in tiny.iterdir()})
    return hub


def command(*arguments: object, exit_code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["convert", "hf-to-orbax", *map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return result.stdout, result.stderr


def shards_on_disk(root: Path) -> set[str]:
    return {file.name for file in root.rglob("*.safetensors")}


@pytest.mark.parametrize("storage", Storage)
def test_the_result_is_that_of_the_folder(served: LoopbackHub, tiny: Path, tmp_path: Path, storage: Storage) -> None:
    _, err = command(REPO, tmp_path / "out", "--dtype", storage)
    assert f"source {REPO} at {COMMIT}, 7 shards" in " ".join(err.split())
    assert "fetches" in err
    hf_to_orbax(tiny, tmp_path / "alone", storage=storage)
    out, alone = open_store(tmp_path / "out"), open_store(tmp_path / "alone")
    assert out.manifest.leaves == alone.manifest.leaves
    assert verify(out) == []
    assert compare_with_source(out, tiny) == []
    assert out.metadata["source"]["name"] == REPO
    assert out.metadata["source"]["revision"] == COMMIT
    assert (tmp_path / "out" / "config.json").read_bytes() == (tiny / "config.json").read_bytes()
    sources = read_sources(out)
    assert sources.tensors == read_sources(alone).tensors
    assert {name: shard.sha256 for name, shard in sources.shards.items()} == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in tiny.glob("*.safetensors")
    }


def test_a_dry_run_fetches_no_weights(served: LoopbackHub, tiny: Path, tmp_path: Path) -> None:
    out, _ = command(REPO, tmp_path / "out", "--dry-run", "--json", "-")
    document = json.loads(out)
    assert document["estimate"]["to_fetch"] > sum(file.stat().st_size for file in tiny.glob("*.safetensors"))
    assert document["estimate"]["rates"]["measured"] is False
    assert document["tensors"] == 367
    assert not shards_on_disk(tmp_path)
    assert all(request.range for request in served.requests if "/cdn/" in request.path)
    headers = len(served.requests)
    out, _ = command(REPO, tmp_path / "out", "--dry-run", "--measure", "--json", "-")
    assert json.loads(out)["estimate"]["rates"]["measured"] is True
    assert len(served.requests) > 2 * headers  # what a measurement asks for comes on top of the same headers
    assert not shards_on_disk(tmp_path)


def test_shards_are_given_up_one_by_one(served: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most: list[int] = []
    finish = StreamedCheckpoint.finish

    def counted(self: StreamedCheckpoint, shard: str) -> None:
        most.append(len(shards_on_disk(tmp_path / "hub")))
        finish(self, shard)

    monkeypatch.setattr(StreamedCheckpoint, "finish", counted)
    command(REPO, tmp_path / "out", "--discard-source")
    assert len(most) == 7
    assert max(most) <= AHEAD
    assert shards_on_disk(tmp_path / "hub") == set()
    assert verify(open_store(tmp_path / "out")) == []


def interrupted_after(part: float) -> Any:
    def progress(advance: Advance) -> None:
        if advance.written > part * advance.to_write:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_run_fetches_only_what_it_still_needs(served: LoopbackHub, tiny: Path, tmp_path: Path) -> None:
    with open_repository(REPO, discard=True) as checkpoint:
        planned = plan(checkpoint, Config.from_hf(checkpoint.config), Storage.BFLOAT16)
        with pytest.raises(KeyboardInterrupt):
            carry_out(planned, checkpoint, tmp_path / "out", progress=interrupted_after(0.5))
    assert not (tmp_path / "out").exists()
    served.requests.clear()
    command(REPO, tmp_path / "out", "--discard-source")
    whole = {
        request.path.rpartition("/")[2] for request in served.requests if "/cdn/" in request.path and not request.range
    }
    assert 1 <= len(whole) < 6
    hf_to_orbax(tiny, tmp_path / "alone")
    assert open_store(tmp_path / "out").manifest.leaves == open_store(tmp_path / "alone").manifest.leaves
    assert shards_on_disk(tmp_path / "hub") == set()


def test_a_moved_branch_does_not_continue_an_interrupted_run(served: LoopbackHub, tiny: Path, tmp_path: Path) -> None:
    with open_repository(REPO) as checkpoint:
        planned = plan(checkpoint, Config.from_hf(checkpoint.config), Storage.BFLOAT16)
        with pytest.raises(KeyboardInterrupt):
            carry_out(planned, checkpoint, tmp_path / "out", progress=interrupted_after(0.1))
    served.add(REPO, "4" * 40, {file.name: file.read_bytes() for file in tiny.iterdir()})
    _, err = command(REPO, tmp_path / "out", exit_code=2)
    assert "an unfinished conversion with other settings" in err
    assert "4" * 40 in err
    command(REPO, tmp_path / "out", "--revision", COMMIT)


def test_files_of_a_folder_are_never_deleted(tiny: Path, tmp_path: Path) -> None:
    _, err = command(tiny, tmp_path / "out", "--discard-source", exit_code=2)
    assert "is a local folder, whose files are not deleted" in err


def test_layers_need_only_their_shards(served: LoopbackHub, tmp_path: Path) -> None:
    command(REPO, tmp_path / "out", "--layers", "2")
    # The embedding, layer 2, the head; neither other layers nor the mtp stage.
    assert len(shards_on_disk(tmp_path / "hub")) == 3
    assert open_store(tmp_path / "out").metadata["layers"] == [2]
