"""Repositories opened by their headers, whose shards arrive while they are read; with the real Hub client."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from dsv4_convert.checkpoint import open_checkpoint
from dsv4_convert.checkpoint.hub_progress import Stopped
from dsv4_convert.checkpoint.hub_stream import open_repository
from dsv4_convert.checkpoint.streamed import AHEAD, StreamedCheckpoint
from dsv4_convert.errors import BadInput, ResourceError

from .hub_server import LoopbackHub
from .safetensors_files import raw_file, u8_header

REPO, COMMIT = "org/model", "1" * 40
SIZE = 700_000  # more than is asked for of a header
COUNT = 8
SHARDS = [f"model-{number:05d}-of-{COUNT:05d}.safetensors" for number in range(1, COUNT + 1)]


def content(number: int) -> bytes:
    return bytes([number + 1]) * SIZE


def files_of() -> dict[str, bytes]:
    weight_map = {f"layers.{number}.w": shard for number, shard in enumerate(SHARDS)}
    return {
        "config.json": b'{"one": 1}',
        "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}).encode(),
        "tokenizer.json": b"{}",
        **{
            shard: raw_file(u8_header({f"layers.{number}.w": SIZE}), content(number))
            for number, shard in enumerate(SHARDS)
        },
    }


@pytest.fixture
def served(hub: LoopbackHub) -> LoopbackHub:
    hub.add(REPO, COMMIT, files_of())
    return hub


def opened(**options: object) -> StreamedCheckpoint:
    checkpoint = open_repository(REPO, **options)
    assert isinstance(checkpoint, StreamedCheckpoint)
    return checkpoint


def shards_on_disk(checkpoint: StreamedCheckpoint) -> list[str]:
    """Shards that take space: in the snapshot, and in the cache beside it (where a file has its hash as name)."""
    blobs = checkpoint.root.parents[1] / "blobs"
    return [file.name for file in blobs.iterdir() if file.stat().st_size > SIZE // 2]


def wait_until(condition: object, seconds: float = 20) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_opening_fetches_headers_and_no_weights(served: LoopbackHub, tmp_path: Path) -> None:
    with opened() as checkpoint:
        assert sum(served.sent.get(shard, 0) for shard in SHARDS) < COUNT * (SIZE + 100)
        assert all(request.range for request in served.requests if "/cdn/" in request.path)
        assert {request.token for request in served.requests} == {None}
        assert checkpoint.config == {"one": 1}
        assert checkpoint.repository == REPO
        assert checkpoint.revision == COMMIT
        assert checkpoint.sizes == {shard: len(files_of()[shard]) for shard in SHARDS}
        assert checkpoint.to_fetch > COUNT * SIZE
        assert not list((tmp_path / "hub").rglob("*.safetensors"))
        headers = dict(checkpoint.tensors)
        digests = dict(checkpoint.digests)
    from dsv4_convert.checkpoint.hub import download

    with open_checkpoint(download(REPO).path) as whole:
        assert dict(whole.tensors) == headers
        assert digests == {file.name: whole.file_sha256(file) for file in whole.shards}
    served.sent.clear()
    with opened() as again:  # all on disk: the headers are read there
        assert dict(again.tensors) == headers
        assert again.to_fetch == 0
        assert not served.sent


def test_a_server_without_ranges_is_left_when_there_is_enough(served: LoopbackHub) -> None:
    served.ranges = False
    with opened() as checkpoint:
        assert len(checkpoint.tensors) == COUNT


def test_only_the_shards_that_are_wanted(served: LoopbackHub) -> None:
    with opened(want=lambda name: name in ("layers.2.w", "layers.5.w")) as checkpoint:
        assert set(checkpoint.tensors) == {"layers.2.w", "layers.5.w"}
        assert checkpoint.absent == {f"layers.{number}.w" for number in range(COUNT)} - set(checkpoint.tensors)


def test_reading_waits_for_the_shard(served: LoopbackHub) -> None:
    with opened() as checkpoint:
        checkpoint.start(SHARDS)
        for number in (0, 7, 3):
            assert bytes(checkpoint.read_bytes(f"layers.{number}.w")) == content(number)
        assert checkpoint.fetched > SIZE


def test_reading_without_an_order(served: LoopbackHub) -> None:
    with opened() as checkpoint:
        assert bytes(checkpoint.read_bytes("layers.4.w")) == content(4)
        assert len(shards_on_disk(checkpoint)) == 1


def test_few_shards_are_on_disk_when_each_is_given_up(served: LoopbackHub) -> None:
    with opened(discard=True) as checkpoint:
        assert checkpoint.most_on_disk == AHEAD * len(files_of()[SHARDS[0]])
        checkpoint.start(SHARDS)
        most = 0
        for number, shard in enumerate(SHARDS):
            assert bytes(checkpoint.read_bytes(f"layers.{number}.w")) == content(number)
            wait_until(lambda number=number: len(checkpoint._here) >= min(number + AHEAD, COUNT))
            most = max(most, len(shards_on_disk(checkpoint)))
            checkpoint.finish(shard)
            assert not (checkpoint.root / shard).exists()
        assert most == AHEAD
        assert shards_on_disk(checkpoint) == []
        assert (checkpoint.root / "config.json").exists()


def test_a_shard_that_is_waited_for_comes_whatever_the_order(served: LoopbackHub) -> None:
    """All slots are taken by shards that nobody finishes: reading the last one must not wait for ever."""
    with opened(discard=True) as checkpoint:
        checkpoint.start(SHARDS)
        wait_until(lambda: len(checkpoint._here) == AHEAD)
        assert bytes(checkpoint.read_bytes("layers.7.w")) == content(7)


def test_discarding_in_a_folder_leaves_the_rest_alone(served: LoopbackHub, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "notes.txt").write_text("mine")
    with opened(discard=True, local_dir=here) as checkpoint:
        checkpoint.fetch_small_files()
        checkpoint.start(SHARDS[:2])
        assert bytes(checkpoint.read_bytes("layers.0.w")) == content(0)
        assert (here / SHARDS[0]).exists()
        checkpoint.finish(SHARDS[0])
        assert not (here / SHARDS[0]).exists()
        assert (here / "notes.txt").exists()
        assert (here / "config.json").exists()
        assert not list((here / ".cache").rglob(f"{SHARDS[0]}*.metadata"))


@pytest.mark.parametrize("in_folder", [False, True])
def test_what_was_on_disk_before_is_not_discarded(served: LoopbackHub, tmp_path: Path, in_folder: bool) -> None:
    where = {"local_dir": tmp_path / "here"} if in_folder else {}
    with opened(**where) as checkpoint:  # as any other program leaves it there
        checkpoint.start(SHARDS[:1])
        assert bytes(checkpoint.read_bytes("layers.0.w")) == content(0)
    with opened(discard=True, **where) as checkpoint:
        checkpoint.start(SHARDS[:2])
        for number, shard in enumerate(SHARDS[:2]):
            assert bytes(checkpoint.read_bytes(f"layers.{number}.w")) == content(number)
            checkpoint.finish(shard)
        assert bytes((checkpoint.root / SHARDS[0]).read_bytes()).endswith(content(0))
        assert not (checkpoint.root / SHARDS[1]).exists()
    assert not list(tmp_path.rglob("dsv4-fetched"))


def test_a_shard_of_the_right_size_and_wrong_content_is_fetched_again_then_named(served: LoopbackHub) -> None:
    file = served.commits[REPO][COMMIT][SHARDS[1]]
    file.sent = file.content[:-1] + b"\xff"
    with opened() as checkpoint:
        checkpoint.start(SHARDS[:2])
        with pytest.raises(BadInput) as caught:
            checkpoint.read("layers.1.w")
        message = str(caught.value)
        assert SHARDS[1] in message
        assert f"expected sha256 {file.etag}, found " in message
        assert "fetched again" in message
    assert served.fetched().count(SHARDS[1]) >= 2


def test_wrong_content_in_the_cache_is_replaced(served: LoopbackHub) -> None:
    with opened() as checkpoint:
        checkpoint.read("layers.0.w")
        blob = (checkpoint.root / SHARDS[0]).resolve()
    damaged = bytearray(blob.read_bytes())
    damaged[-1] ^= 1
    blob.write_bytes(damaged)
    with opened() as checkpoint:
        assert bytes(checkpoint.read_bytes("layers.0.w")) == content(0)


def test_a_connection_that_breaks_is_taken_up_again(served: LoopbackHub) -> None:
    with opened() as checkpoint:
        served.cuts[SHARDS[0]] = SIZE // 2
        assert bytes(checkpoint.read_bytes("layers.0.w")) == content(0)


def test_a_failing_hub_ends_the_reading_with_its_reason(served: LoopbackHub) -> None:
    with opened() as checkpoint:
        served.failures[SHARDS[2]] = 503
        checkpoint.start(SHARDS[2:])
        with pytest.raises(ResourceError, match="HTTP 503"):
            checkpoint.read("layers.2.w")


def test_a_header_that_contradicts_the_index_is_refused(hub: LoopbackHub) -> None:
    files = files_of()
    files[SHARDS[0]] = raw_file(u8_header({"layers.99.w": SIZE}), content(0))
    hub.add(REPO, COMMIT, files)
    with pytest.raises(BadInput, match=r"'layers\.99\.w': in model-00001.*but not in the index"):
        open_repository(REPO)


def test_a_file_that_is_no_safetensors_is_refused_by_its_first_bytes(hub: LoopbackHub) -> None:
    hub.add(REPO, COMMIT, files_of() | {SHARDS[3]: b"<html>" + bytes(SIZE)})
    with pytest.raises(BadInput, match=rf"{SHARDS[3]}: expected a safetensors file, found a web page"):
        open_repository(REPO)


def test_closing_ends_the_threads_and_the_waiting(served: LoopbackHub) -> None:
    checkpoint = opened(discard=True)
    checkpoint.start(SHARDS)
    wait_until(lambda: len(checkpoint._here) == AHEAD)
    assert fetchers()
    checkpoint.close()
    assert not fetchers()
    with pytest.raises(Stopped):
        checkpoint.read("layers.7.w")


def test_stopping_wakes_a_reader(served: LoopbackHub) -> None:
    """As after Ctrl-C, when threads wait for shards that will not come."""
    with opened(discard=True) as checkpoint:
        caught: list[BaseException] = []
        served.failures["/cdn/"] = 429  # retried for a long time

        def read() -> None:
            try:
                checkpoint.read("layers.0.w")
            except BaseException as error:
                caught.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.05)
        checkpoint.stop()
        reader.join(timeout=20)
        assert not reader.is_alive()
        assert caught


def fetchers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dsv4-fetch")]


def test_without_the_hub_the_files_on_disk_are_opened(served: LoopbackHub) -> None:
    from dsv4_convert.checkpoint.hub import download

    download(REPO)
    served.failures["/"] = 503
    with open_repository(REPO) as checkpoint:
        assert not isinstance(checkpoint, StreamedCheckpoint)
        assert checkpoint.repository == REPO
        assert bytes(checkpoint.read_bytes("layers.1.w")) == content(1)
