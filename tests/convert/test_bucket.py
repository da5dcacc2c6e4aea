"""From a bucket to a bucket: shards are copied to scratch while they are needed, and nothing stays there."""

from __future__ import annotations

import tempfile
from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner

from dsv4_convert.checkpoint import open_checkpoint
from dsv4_convert.checkpoint.arriving import AHEAD
from dsv4_convert.checkpoint.bucket import BucketCheckpoint, open_bucket
from dsv4_convert.cli import app
from dsv4_convert.convert import hf_to_orbax
from dsv4_convert.convert.against import compare_with_source
from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.store import open_store, verify

URL = "gs://bucket/hf"
pytestmark = pytest.mark.usefixtures("bucket")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bucket") / "hf"
    write_checkpoint(folder, tiny_config())
    return folder


@pytest.fixture
def uploaded(tiny: Path, bucket: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint in the bucket; returns the folder in which scratch files lie."""
    files = fsspec.filesystem("gcs")
    for file in tiny.iterdir():
        files.pipe(f"/bucket/hf/{file.name}", file.read_bytes())
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    return scratch


def convert(*arguments: object, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, ["convert", "hf-to-orbax", *map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return result.stderr


def test_from_bucket_to_bucket(tiny: Path, uploaded: Path, tmp_path: Path) -> None:
    before = dict(fsspec.filesystem("gcs").store)
    err = convert(URL, "gs://bucket/orbax")
    assert f"source  {URL}, 7 shards" in err
    assert "needed in the bucket" in err
    hf_to_orbax(tiny, tmp_path / "alone")
    store = open_store("gs://bucket/orbax")
    assert store.manifest.leaves == open_store(tmp_path / "alone").manifest.leaves
    assert verify(store) == []
    assert compare_with_source(store, tiny) == []
    assert {name for name in before if name.startswith("/bucket/hf")} <= set(fsspec.filesystem("gcs").store)
    assert not list(uploaded.iterdir())


def test_few_shards_are_in_scratch_at_a_time(uploaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most: list[int] = []
    finish = BucketCheckpoint.finish

    def counted(self: BucketCheckpoint, shard: str) -> None:
        most.append(len(list(uploaded.rglob("*.safetensors"))))
        finish(self, shard)

    monkeypatch.setattr(BucketCheckpoint, "finish", counted)
    convert(URL, tmp_path / "orbax", "--layers", "1,2")
    assert 0 < max(most) <= AHEAD
    assert not list(uploaded.iterdir())


def test_opening_reads_headers_only(tiny: Path, uploaded: Path) -> None:
    with open_bucket(URL) as remote, open_checkpoint(tiny) as local:
        assert {name: (info.dtype, info.shape, info.start) for name, info in remote.tensors.items()} == {
            name: (info.dtype, info.shape, info.start) for name, info in local.tensors.items()
        }
        assert not list(remote.root.glob("*.safetensors"))
        assert remote.read("embed.weight").tobytes() == local.read("embed.weight").tobytes()
        assert [file.name for file in remote.root.glob("*.safetensors")] == [local.tensors["embed.weight"].file.name]


def test_what_is_refused(uploaded: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such folder in the bucket"):
        open_bucket("gs://bucket/nothing")
    with pytest.raises(UsageError, match=r"none of the \d+ tensors is wanted"):
        open_bucket(URL, want=lambda _: False)
    assert "expected gs://bucket/path" in convert("s3://bucket/hf", tmp_path / "orbax", exit_code=2)
    fsspec.filesystem("gcs").rm("/bucket/hf/config.json")
    with pytest.raises(BadInput, match=r"no config\.json"):
        open_bucket(URL)
    assert not list(uploaded.iterdir())
