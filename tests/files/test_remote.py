"""Folders behind a URL: nothing that a server does takes memory or time without a bound."""

from __future__ import annotations

import contextlib
import threading
import time
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from huggingface_hub import close_session, constants

from dsv4_convert.checkpoint.hub_plan import plan_download
from dsv4_convert.errors import BadInput, Dsv4Error, ResourceError, UsageError
from dsv4_convert.files import remote
from dsv4_convert.files.remote import BucketFolder, HttpFolder

from ..checkpoint.hub_server import LoopbackHub
from .odd_answers import UNBOUNDED, Answer, another_range, chunked, of_stated_size


class OddServer(ThreadingHTTPServer):
    """Gives one odd answer to every request, and keeps the requests."""

    daemon_threads = True
    answer: Answer

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Whoever has enough leaves."""


class _Handler(BaseHTTPRequestHandler):
    server: OddServer

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        with contextlib.suppress(ConnectionError):
            self.server.answer(self)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> Iterator[OddServer]:
    monkeypatch.setattr(remote, "WAITS", ())
    monkeypatch.setattr(remote, "GRACE_SECONDS", 1.0)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    server = OddServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(odd: OddServer) -> HttpFolder:
    return HttpFolder(f"http://127.0.0.1:{odd.server_port}/golden")


@pytest.mark.parametrize("what", UNBOUNDED)
@pytest.mark.parametrize("part", ["content", "size", "range"])
def test_bytes_and_time_are_bounded(odd: OddServer, folder: HttpFolder, what: str, part: str) -> None:
    odd.answer, said = UNBOUNDED[what]
    tracemalloc.start()
    begun = time.monotonic()
    try:
        if part == "content":
            with pytest.raises(Dsv4Error, match=said):
                folder.content("manifest.json", limit=1 << 20)
        elif part == "size":
            with contextlib.suppress(Dsv4Error):
                assert folder.size("model.safetensors") < 1 << 40
        else:
            with contextlib.suppress(Dsv4Error):
                assert len(folder.read("model.safetensors", 0, 1000)) == 1000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - begun < 10
    assert peak < 16 << 20


def test_odd_answers_to_a_range_have_their_words(odd: OddServer, folder: HttpFolder) -> None:
    odd.answer = of_stated_size(1 << 60)
    with pytest.raises(BadInput, match=rf"golden/a: {1 << 60:,} bytes, says the server"):
        folder.size("a")
    odd.answer = chunked
    with pytest.raises(ResourceError, match=r"golden/a: the server does not state its size.*chunked transfer off"):
        folder.size("a")
    with pytest.raises(ResourceError, match="does not send the range that was asked for"):
        folder.read("a", 100, 110)
    with pytest.raises(ResourceError, match="4 of 10 bytes came"):
        folder.read("a", 0, 10)
    odd.answer = another_range
    with pytest.raises(ResourceError, match="does not send the range that was asked for"):
        folder.read("a", 0, 10)


def test_a_signature_and_a_password_are_sent_and_never_shown(odd: OddServer) -> None:
    odd.answer = lambda handler: handler.send_error(403)
    folder = HttpFolder(f"http://me:pass%2Fword@127.0.0.1:{odd.server_port}/golden?sig=SECRET")
    with pytest.raises(BadInput, match=r"/golden/manifest\.json: the server refuses access \(HTTP 403\)") as caught:
        folder.content("manifest.json")
    ((path, authorization),) = odd.asked
    assert path == "/golden/manifest.json?sig=SECRET"
    assert authorization is not None
    for secret in ("SECRET", "pass%2F", "me:"):
        assert secret not in str(caught.value) + folder.url
    assert caught.value.__suppress_context__  # what a library says of it is not printed either


def test_a_try_again_later_is_obeyed(odd: OddServer, folder: HttpFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(429)
        handler.send_header("Retry-After", "7")
        handler.end_headers()

    slept: list[float] = []
    monkeypatch.setattr(remote, "WAITS", (1.0, 4.0))
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=slept.append, monotonic=time.monotonic))
    odd.answer = busy
    with pytest.raises(ResourceError, match="HTTP 429"):
        folder.content("a")
    assert slept == [7.0, 7.0]


def test_a_file_system_that_hangs_is_left(bucket: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS", ())
    monkeypatch.setattr(remote, "GRACE_SECONDS", 0.2)
    folder = BucketFolder("gs://bucket/model")
    released = threading.Event()
    monkeypatch.setattr(folder._system, "size", lambda _: released.wait(20))
    with pytest.raises(ResourceError, match=r"gs://bucket/model/a: cannot be read \(too slow"):
        folder.size("a")
    released.set()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("HTTPS_PROXY", "foo://me:secret@proxy", "of a kind that the client does not know"),
        ("HTTPS_PROXY", "http://me:sec/ret@proxy", "is not a URL"),
        ("SSL_CERT_FILE", "/nope", "SSL_CERT_FILE"),
    ],
)
def test_an_environment_that_keeps_it_from_asking(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str, hub: LoopbackHub
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    close_session()
    for ask in (lambda: HttpFolder("https://127.0.0.1:9/x").content("a"), lambda: plan_download("org/model")):
        with pytest.raises(UsageError, match=said) as caught:
            ask()
        assert "sec" not in str(caught.value)


def test_what_is_no_url() -> None:
    with pytest.raises(UsageError, match="expected a URL"):
        HttpFolder("http://[::1")
