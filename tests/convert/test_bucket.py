"""From a bucket to a bucket: shards are copied to scratch while they are needed, and nothing stays there."""

from __future__ import annotations

import errno
import itertools
import tempfile
import threading
import time
from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner

from dsv4_convert.checkpoint import open_checkpoint
from dsv4_convert.checkpoint.bucket import BucketOrigin, open_bucket
from dsv4_convert.checkpoint.hub_progress import Meter
from dsv4_convert.checkpoint.planned import PlannedFile
from dsv4_convert.checkpoint.streamed import AHEAD, StreamedCheckpoint
from dsv4_convert.cli import app
from dsv4_convert.convert import Advance, Storage, carry_out, hf_to_orbax, plan
from dsv4_convert.convert.against import compare_with_source
from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.store import arrays, open_store, verify

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
    finish = StreamedCheckpoint.finish

    def counted(self: StreamedCheckpoint, shard: str) -> None:
        most.append(len(list(uploaded.rglob("*.safetensors"))))
        finish(self, shard)

    monkeypatch.setattr(StreamedCheckpoint, "finish", counted)
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
    assert "or gs://bucket/path" in convert("s3://bucket/hf", tmp_path / "orbax", exit_code=2)
    fsspec.filesystem("gcs").rm("/bucket/hf/config.json")
    with pytest.raises(BadInput, match=r"no config\.json"):
        open_bucket(URL)
    assert not list(uploaded.iterdir())


@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_is_what_is_told_while_another_thread_waits_for_a_shard(
    uploaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Whichever of the two threads fails: the failure of the other, which the end of the work brings, is not raised."""
    waits = threading.Event()
    arrive, fetch, write = StreamedCheckpoint._arrive, BucketOrigin.fetch, arrays._write_all
    opened: list[StreamedCheckpoint] = []

    def arriving(self: StreamedCheckpoint, file: Path) -> None:
        if file.name.startswith("model-00003"):
            opened.append(self)
            waits.set()
        arrive(self, file)

    def stalled(self: BucketOrigin, file: PlannedFile, meter: Meter, *, force: bool = False) -> Path:
        if file.name.startswith("model-00003"):
            assert waits.wait(60)
            with opened[0]._change:
                assert opened[0]._change.wait_for(lambda: opened[0]._failure is not None, timeout=60)
        return fetch(self, file, meter, force=force)

    def full(descriptor: int, view: memoryview) -> None:
        if threading.current_thread().name == f"dsv4-store_{failing}":
            assert waits.wait(60)
            time.sleep(0.1)  # the other thread is about to wait
            raise OSError(errno.ENOSPC, "No space left on device")
        write(descriptor, view)

    monkeypatch.setattr(StreamedCheckpoint, "_arrive", arriving)
    monkeypatch.setattr(BucketOrigin, "fetch", stalled)
    monkeypatch.setattr(arrays, "_write_all", full)
    said = convert(URL, tmp_path / "orbax", "--workers", "2", exit_code=4)
    assert "No space left on device" in said
    assert "run the same command again" in said


def test_progress_is_told_one_call_at_a_time_and_only_grows(uploaded: Path, tmp_path: Path) -> None:
    alone = threading.Lock()
    told: list[Advance] = []

    def progress(now: Advance) -> None:
        assert alone.acquire(blocking=False), "two calls at once"
        told.append(now)
        time.sleep(0.002)
        alone.release()

    with open_bucket(URL) as checkpoint:
        planned = plan(checkpoint, checkpoint.architecture(), Storage.BFLOAT16)
        summary = carry_out(planned, checkpoint, tmp_path / "orbax", progress=progress)
        fetched = checkpoint.fetched
    first, last = told[0], told[-1]
    assert (first.read, first.written, first.path) == (0, 0, "")
    assert (last.written, last.to_write) == (summary.total_bytes, summary.total_bytes)
    assert last.read == pytest.approx(last.to_read, rel=1e-3)
    assert last.fetched == fetched > 0
    for earlier, later in itertools.pairwise(told):
        assert (earlier.read, earlier.written) <= (later.read, later.written)
        assert earlier.fetched is not None
        assert later.fetched is not None
        assert earlier.fetched <= later.fetched
