"""Goldens behind a URL: the same arrays, only the parts that are read, and words for what a server may do."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest

import dsv4_convert.golden as golden_package
from dsv4_convert.convert import hf_to_orbax
from dsv4_convert.errors import BadInput, ResourceError, UsageError
from dsv4_convert.files import remote
from dsv4_convert.golden import files
from dsv4_convert.golden.archive import open_golden
from dsv4_convert.golden.noise import Mode
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.parity.run import ParityOptions, run_parity
from tests.checkpoint.hub_server import LoopbackHub
from tests.memory_bucket import MemoryBucket

COMMITTED = Path(golden_package.__file__).parent / "data" / "tiny"


class Server(ThreadingHTTPServer):
    """Serves a folder by ranges on the loopback interface, and counts the bytes that it sends of each file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sent: dict[str, int] = {}
        self.ranges = True
        #: Whether a response states its length; one that is compressed or chunked does not.
        self.sized = True
        #: Requests that are answered with 503 before one is served.
        self.failing = 0
        #: Whether every request is answered with 403.
        self.refusing = False
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/golden"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.do_GET(send=False)

    def do_GET(self, *, send: bool = True) -> None:
        name = self.path.partition("?")[0].removeprefix("/golden/")
        file = self.server.root / name
        if self.server.failing:
            self.server.failing -= 1
            return self.send_error(503)
        if self.server.refusing:
            return self.send_error(403)
        if not file.is_file():
            return self.send_error(404)
        content = file.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "") if self.server.ranges else None
        part = content[int(wanted[1]) : int(wanted[2]) + 1] if wanted else content
        self.send_response(206 if wanted else 200)
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if wanted:
            of = len(content) if self.server.sized else "*"
            self.send_header("Content-Range", f"bytes {wanted[1]}-{wanted[2]}/{of}")
        if self.server.sized or name.endswith(".json"):
            self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if send:
            self.server.sent[name] = self.server.sent.get(name, 0) + len(part)
            self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server of the committed golden, which is copied to ``folder``."""
    shutil.copytree(COMMITTED, folder)
    running = Server(folder)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "WAITS", (0, 0))
    with serving(tmp_path / "served") as running:
        yield running


@pytest.fixture
def bucket() -> Iterator[str]:
    """``gs://`` in memory, with the committed golden in it."""
    before = fsspec.get_filesystem_class("gs") if "gs" in fsspec.registry else None
    fsspec.register_implementation("gs", MemoryBucket, clobber=True)
    MemoryBucket.store.clear()
    system = MemoryBucket()
    for file in COMMITTED.iterdir():
        system.pipe(f"gs://bucket/goldens/tiny/{file.name}", file.read_bytes())
    yield "gs://bucket/goldens/tiny"
    MemoryBucket.store.clear()
    if before is not None:
        fsspec.register_implementation("gs", before, clobber=True)


def test_every_array_is_the_same_from_a_server_and_a_bucket(server: Server, bucket: str) -> None:
    local = open_golden(COMMITTED)
    for url in (server.url, bucket + "/"):
        remote = open_golden(url)
        assert remote.manifest == local.manifest
        for name in local.names:
            np.testing.assert_array_equal(remote.read(name), local.read(name))
        assert remote.verify() == []


def test_a_golden_in_a_repository(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.required_token = "hf_secret"
    hub.add("org/goldens", "1" * 40, {f"tiny/{file.name}": file.read_bytes() for file in COMMITTED.iterdir()})
    local = open_golden(COMMITTED)
    for url in ("hf://org/goldens/tiny", "hf://models/org/goldens@main/tiny", f"hf://org/goldens@{'1' * 40}/tiny/"):
        remote_golden = open_golden(url)
        np.testing.assert_array_equal(remote_golden.read("layers.1.attn.q"), local.read("layers.1.attn.q"))
    assert {(request.path.startswith("/cdn/"), request.token) for request in hub.requests} == {
        (False, "hf_secret"),
        (True, None),
    }
    with pytest.raises(BadInput, match=r"hf://org/goldens/none: no manifest\.json"):
        open_golden("hf://org/goldens/none")
    with pytest.raises(BadInput, match="org/nothing: no such repository"):
        open_golden("hf://org/nothing/tiny")
    with pytest.raises(UsageError, match="expected hf://ORG/NAME"):
        open_golden("hf://nothing")


def test_only_what_is_read_is_fetched(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_BLOCK_BYTES", 4096)
    opened = open_golden(server.url)
    assert set(server.sent) == {"manifest.json"}
    opened.noise("layers.2.attn.wq_a", "float32", Mode.ISOLATED)
    array = opened.read("layers.2.attn.wq_a")
    assert set(server.sent) == {"manifest.json", "layer-00002.safetensors"}
    size = (COMMITTED / "layer-00002.safetensors").stat().st_size
    header = 1 << 19  # the first request for a header, whatever its size
    assert array.nbytes <= server.sent["layer-00002.safetensors"] <= header + 4 * array.nbytes < size


def test_parity_with_a_golden_behind_a_url(server: Server, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config(), seed=0)
    hf_to_orbax(tmp_path / "hf", tmp_path / "orbax")
    report = run_parity(tmp_path / "orbax", server.url, ParityOptions(layers=[1]))
    assert report.passed
    assert report.golden["path"] == server.url
    assert report.taps == run_parity(tmp_path / "orbax", COMMITTED, ParityOptions(layers=[1])).taps
    assert "layer-00003.safetensors" not in server.sent


def test_a_hiccup_is_survived_and_an_outage_is_said(server: Server) -> None:
    server.failing = 2
    opened = open_golden(server.url)
    server.failing = 1
    opened.read("embed")
    server.failing = 1000
    with pytest.raises(ResourceError, match=r"layer-00000\.safetensors: cannot be read .*503.*run the same command"):
        opened.read("layers.0.attn.q")


def test_damage_on_the_way_is_noticed(server: Server) -> None:
    file = server.root / "layer-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    (problem,) = open_golden(server.url).verify()
    assert f"{server.url}/layer-00001.safetensors: layers.1." in problem
    file.write_bytes(bytes(content[:-100]))
    with pytest.raises(BadInput, match=re.escape(f"{server.url}/layer-00001.safetensors")):
        open_golden(server.url).read("layers.1.attn.q")
    file.unlink()
    with pytest.raises(BadInput, match=re.escape(f"{server.url}/layer-00001.safetensors: missing")):
        open_golden(server.url).read("layers.1.attn.q")


def test_what_is_no_golden(server: Server) -> None:
    (server.root / "manifest.json").unlink()
    with pytest.raises(BadInput, match=re.escape(f"{server.url}: no manifest.json")):
        open_golden(server.url)
    with pytest.raises(UsageError, match=r"nope://x: .*expected a folder, or a URL"):
        open_golden("nope://x")


def test_a_server_without_ranges_is_refused_with_the_way_out(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_BLOCK_BYTES", 4096)
    server.ranges = False
    opened = open_golden(server.url)
    with pytest.raises(ResourceError, match="files are read by ranges; download the folder"):
        opened.read("layers.0.attn.q")


def test_a_file_of_unknown_size_is_refused_with_the_way_out(server: Server) -> None:
    server.sized = False
    with pytest.raises(ResourceError, match=r"does not state its size.*turn compression and chunked transfer off"):
        open_golden(server.url).read("layers.1.attn.wq_a")


def test_a_bug_is_not_blamed_on_the_network(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = open_golden(server.url)
    monkeypatch.setattr(remote.HttpFolder, "_range", lambda *_: None + 1)
    with pytest.raises(TypeError):
        golden.read("layers.1.attn.wq_a")


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS", (0, 0))
    with pytest.raises(ResourceError, match=r"http://127\.0\.0\.1:9/golden/manifest\.json: cannot be read"):
        open_golden("http://127.0.0.1:9/golden")
