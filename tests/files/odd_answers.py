"""Answers that a server should not give, as functions of a request's handler."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler

#: For pauses that last, whatever a test makes of time.sleep.
_NEVER = threading.Event()
Answer = Callable[[BaseHTTPRequestHandler], None]


def begin(handler: BaseHTTPRequestHandler, headers: dict[str, str], status: int = 200) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.flush()


def saying(body: object, **headers: str) -> Answer:
    """JSON, or bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler, {"Content-Length": str(len(content)), **headers})
        handler.wfile.write(content)

    return answer


def endless(handler: BaseHTTPRequestHandler) -> None:
    """JSON that never ends, of unknown size."""
    begin(handler, {"Connection": "close"})
    handler.wfile.write(b'{"a": "')
    while True:
        handler.wfile.write(b"x" * (1 << 20))


def of_stated_size(size: int) -> Answer:
    """As long as that, it says; it goes on for ever."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range")
        headers = {"Content-Length": str(size)}
        begin(handler, headers | {"Content-Range": f"bytes 0-0/{size}"} if asked else headers, 206 if asked else 200)
        while True:
            handler.wfile.write(b" " * (1 << 20))

    return answer


_BOMB = gzip.compress(bytes(64 << 20))


def bomb(handler: BaseHTTPRequestHandler) -> None:
    """Some kilobytes that unpack to 64 MiB."""
    begin(handler, {"Content-Encoding": "gzip", "Content-Length": str(len(_BOMB))})
    handler.wfile.write(_BOMB)


def trickle(handler: BaseHTTPRequestHandler) -> None:
    """One byte at a time."""
    begin(handler, {"Connection": "close"})
    while True:
        handler.wfile.write(b" ")
        handler.wfile.flush()
        _NEVER.wait(0.05)


def trickling_headers(handler: BaseHTTPRequestHandler) -> None:
    """One byte at a time, and never a body."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while True:
        handler.wfile.write(b"x")
        handler.wfile.flush()
        _NEVER.wait(0.05)


def silence(handler: BaseHTTPRequestHandler) -> None:
    """Headers, then nothing."""
    begin(handler, {"Content-Length": "100"})
    _NEVER.wait(30)


def another_range(handler: BaseHTTPRequestHandler) -> None:
    """Bytes that nobody asked for."""
    begin(handler, {"Content-Length": "10", "Content-Range": "bytes 7-16/100000"}, 206)
    handler.wfile.write(bytes(10))


def chunked(handler: BaseHTTPRequestHandler) -> None:
    """Chunks of unknown size, whatever range was asked for."""
    begin(handler, {"Transfer-Encoding": "chunked"})
    handler.wfile.write(b"4\r\nxxxx\r\n0\r\n\r\n")


#: The behaviour of a server -> the message about it.
UNBOUNDED: dict[str, tuple[Answer, str]] = {
    "endless": (endless, r"more than [\d,]+ bytes|bytes came|expected [\d,]+ bytes, found"),
    "2^60 bytes": (of_stated_size(1 << 60), r"more than [\d,]+ bytes|bytes, says|expected [\d,]+ bytes, found"),
    "a gzip bomb": (bomb, r"sends it compressed \(gzip\)"),
    "one byte at a time": (trickle, "too slow"),
    "one byte of its headers at a time": (trickling_headers, "too slow|cannot be reached"),
    "silence": (silence, "ReadTimeout"),
}
