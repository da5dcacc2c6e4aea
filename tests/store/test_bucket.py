"""Destinations in a bucket: the same checkpoint, through etils.epath, over a file system in memory.

It shows which calls are made, and in which order. It does not show how Google Cloud Storage behaves under load.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from dsv4_convert.convert import hf_to_orbax
from dsv4_convert.convert.against import compare_with_source
from dsv4_convert.errors import BadInput, ResourceError, UsageError
from dsv4_convert.golden.synthetic import tiny_config
from dsv4_convert.golden.synthetic import write_checkpoint as write_published
from dsv4_convert.store import CheckpointWriter, WriteSummary, open_destination, open_store, verify

from ..memory_bucket import MemoryBucket
from .writing import FilledLeaf, write_leaves, write_pending

URL = "gs://bucket/models/tiny"
pytestmark = pytest.mark.usefixtures("bucket")


def write(leaves: list[FilledLeaf], **options: Any) -> WriteSummary:
    return write_leaves(URL, leaves, fingerprint={"revision": "r1"}, **options)


def downloaded(folder: Path) -> Path:
    """The checkpoint, copied out of the bucket by fsspec."""
    fsspec.filesystem("gcs").get("/bucket/models/tiny/", str(folder), recursive=True)
    return folder


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_the_checkpoint_is_that_of_a_folder(tmp_path: Path, arrays, make_leaves, compression, bucket) -> None:
    summaries = []
    for destination in (URL, tmp_path / "local"):
        with CheckpointWriter(destination, make_leaves(arrays), fingerprint={}, compression=compression) as writer:
            writer.add_side_record("n", {"found": 1})
            write_pending(writer)
            summaries.append(writer.commit())
    assert summaries[0] == summaries[1]
    assert summaries[0].side_records == {"n": {"found": 1}}
    copy = downloaded(tmp_path / "copy")
    there, here = (
        {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}
        for root in (copy, tmp_path / "local")
    )
    assert there == here
    assert not [name for name in bucket if ".dsv4-partial" in name]
    store = open_store(URL)
    assert verify(store) == []
    for path, array in arrays.items():
        assert store.read(path).tobytes() == array.tobytes()
    with ocp.PyTreeCheckpointer() as checkpointer:
        assert checkpointer.restore(copy)["hc_head_scale"].tobytes() == arrays["hc_head_scale"].tobytes()


def test_an_interrupted_run_goes_on(tmp_path: Path, arrays, make_leaves, bucket) -> None:
    leaves = make_leaves(arrays)
    made: list[str] = []

    def noted(leaf: FilledLeaf) -> FilledLeaf:
        return replace(leaf, chunks=lambda index: (made.append(leaf.path), leaf.chunks(index))[1])

    def fail(_: object) -> np.ndarray:
        raise RuntimeError("source lost")

    middle = len(leaves) // 2
    with pytest.raises(RuntimeError):
        write([*map(noted, leaves[:middle]), replace(leaves[middle], chunks=fail), *leaves[middle + 1 :]], workers=1)
    with pytest.raises(BadInput, match="not a checkpoint"):
        open_store(URL)
    assert "/bucket/models/tiny/commit_success.txt" not in bucket
    assert "/bucket/models/tiny.dsv4-partial/lock" not in bucket
    first = list(made)
    with pytest.raises(UsageError, match="other settings"):
        write_leaves(URL, leaves, fingerprint={"revision": "r2"})
    summary = write([noted(leaf) for leaf in leaves])
    assert not set(first) & set(made[len(first) :])
    assert summary.kept_bytes == sum(leaf.layout.nbytes for leaf in leaves[:middle])
    assert verify(open_store(URL)) == []


def test_the_manifest_and_orbax_s_mark_come_last(arrays, make_leaves, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    open_file = MemoryBucket._open

    def noted(self: MemoryBucket, path: str, mode: str = "rb", **options: Any) -> Any:
        if "w" in mode:
            written.append(path)
        return open_file(self, path, mode, **options)

    monkeypatch.setattr(MemoryBucket, "_open", noted)
    write(make_leaves(arrays))
    inside = [path for path in written if "/tiny/" in path]
    assert [path.rpartition("/")[2] for path in inside[-2:]] == ["dsv4_manifest.json", "commit_success.txt"]


def test_one_writer_at_a_time_and_a_lock_that_stayed(arrays, make_leaves, bucket) -> None:
    fsspec.filesystem("gcs").pipe("/bucket/models/tiny.dsv4-partial/lock", b"pid 7 on otherhost, since yesterday,")
    with pytest.raises(ResourceError, match=r"pid 7 on otherhost, since yesterday, is writing it.*delete gs://.*/lock"):
        write(make_leaves(arrays))
    fsspec.filesystem("gcs").rm("/bucket/models/tiny.dsv4-partial/lock")
    write(make_leaves(arrays))


def test_of_two_that_take_the_lock_at_once_one_gets_it(bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both look, find nothing, and write; the bucket decides."""
    first, second = (open_destination(URL) for _ in range(2))
    monkeypatch.setattr(epath.Path(URL).__class__, "exists", lambda self: False)
    with first.held(), pytest.raises(ResourceError, match="is writing it"), second.held():
        raise AssertionError("two hold the lock")
    assert "/bucket/models/tiny.dsv4-partial/lock" not in bucket
    with second.held():
        assert "/bucket/models/tiny.dsv4-partial/lock" in bucket


def test_what_is_there_is_never_replaced(arrays, make_leaves, bucket) -> None:
    write(make_leaves(arrays))
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="exists already"):
            write(make_leaves(arrays), overwrite=overwrite)
    fsspec.filesystem("gcs").rm("/bucket/models/tiny/dsv4_manifest.json")
    with pytest.raises(UsageError, match="neither a checkpoint nor an interrupted run"):
        write(make_leaves(arrays))


def test_a_failing_bucket_is_a_resource_error_that_can_be_resumed(
    arrays, make_leaves, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = MemoryBucket._open

    def failing(self: MemoryBucket, path: str, mode: str = "rb", **options: Any) -> Any:
        if "w" in mode and "hc_head_scale" in path and not path.endswith(".zarray"):
            raise OSError("503 backend error")
        return open_file(self, path, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryBucket, "_open", failing)
        with pytest.raises(ResourceError, match=r"hc_head_scale.*503 backend error.*run the same command again"):
            write(make_leaves(arrays))
    write(make_leaves(arrays))
    assert verify(open_store(URL)) == []


@pytest.mark.parametrize("error", [TypeError("a mistake of ours"), MemoryError()])
def test_a_bug_is_not_blamed_on_the_bucket(
    arrays, make_leaves, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(self: MemoryBucket, path: str, mode: str = "rb", **options: Any) -> Any:
        raise error

    monkeypatch.setattr(MemoryBucket, "_open", broken)
    with pytest.raises(type(error)):
        write(make_leaves(arrays))


def test_damage_is_found(arrays, make_leaves, bucket) -> None:
    write(make_leaves(arrays))
    path = "/bucket/models/tiny/layers.3.ffn.experts.w1/2.0.0"
    data = bytearray(fsspec.filesystem("gcs").cat_file(path))
    data[3] ^= 1
    fsspec.filesystem("gcs").pipe(path, bytes(data))
    (problem,) = verify(open_store(URL))
    assert "layers.3.ffn.experts.w1, chunk (2, 0, 0)" in problem


def test_a_whole_conversion(tmp_path: Path) -> None:
    write_published(tmp_path / "hf", tiny_config())
    hf_to_orbax(tmp_path / "hf", URL)
    store = open_store(URL)
    assert compare_with_source(store, tmp_path / "hf") == []
    assert json.loads((epath.Path(URL) / "dsv4_manifest.json").read_text())["schema_version"] == 2


def test_urls_of_nothing_known() -> None:
    with pytest.raises(UsageError, match="not a URL of a bucket"):
        open_store("ftp://host/model")
