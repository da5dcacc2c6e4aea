"""A folder behind a URL: its files by ranges, or whole where they are small. Bounded in bytes and in time.

``https://`` goes through the HTTP client of huggingface_hub, so proxies and certificates are set as for the Hub; every
other kind of URL, such as ``gs://``, goes through fsspec. (fsspec's own client for ``https://`` reads an answer to its
end, however long it is.)

One rule for all requests: silence of ten seconds ends one; a request may take :data:`GRACE_SECONDS`, and a second more
for each :data:`SLOWEST` bytes that came. A request that failed by accident, as far as anybody can tell, is made again
after :data:`WAITS` seconds.
"""

from __future__ import annotations

import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from dsv4_convert.errors import BUGS, BadInput, Dsv4Error, ResourceError, UsageError
from dsv4_convert.files.strict_json import MAX_JSON_BYTES
from dsv4_convert.show.urls import without_secrets

T = TypeVar("T")
#: Called with the bytes of a request that have just come.
OnBytes = Callable[[int], None]

GRACE_SECONDS = 30.0
#: Bytes a second: the slowest transfer that is waited for.
SLOWEST = 64 << 10
#: Seconds before each further try.
WAITS = (1.0, 4.0)
#: The longest that a server may tell us to wait.
_LONGEST_WAIT = 60.0
#: No file of a checkpoint or a golden is larger: 16 TiB.
_LARGEST_FILE = 1 << 44
_ABSENT = (404, 410)
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_DENIED = (401, 403)


class HttpStatus(Exception):
    """An answer of a server that is none of success. Its body is never read."""

    def __init__(self, response: Any) -> None:
        super().__init__(f"HTTP {response.status_code}")
        self.response = response
        self.status: int = response.status_code


class Refused(Exception):
    """An answer that is of no use here; says why, and the way out."""


@dataclass(frozen=True)
class Answer:
    """What came.

    Attributes:
        size: of the whole file, where it is stated.
        first: number of the first byte in it.
        following: URL of the next page, where the answer is one of several.
    """

    content: bytes
    size: int | None
    first: int
    following: str | None


class RemoteFolder(ABC):
    """A folder that is somewhere else. Threads may share it.

    Attributes:
        url: what it is called: its URL without secrets and query.
    """

    def __init__(self, url: str) -> None:
        self.url = re.split("[?#]", without_secrets(url), maxsplit=1)[0].rstrip("/")

    def content(self, name: str, *, limit: int = MAX_JSON_BYTES) -> bytes | None:
        """All of a file of at most ``limit`` bytes; None if there is no such file.

        Raises:
            BadInput: it is larger.
            ResourceError: it cannot be read.
        """
        try:
            found = self._persistently(name, lambda told: self._whole(name, limit + 1, told))
        except FileNotFoundError:
            return None
        if len(found) > limit:
            raise BadInput(f"{self.url}/{name}: more than {limit:,} bytes came, the most that such a file has")
        return found

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError: there is no such file.
            BadInput: a size that no file has.
            ResourceError: it cannot be read, or nobody says how large it is.
        """
        size = self._persistently(name, lambda _: self._stated(name))
        if size is None:
            raise ResourceError(
                f"{self.url}/{name}: the server does not state its size. Files are read by ranges here: turn "
                "compression and chunked transfer off there, or download the folder and give its path."
            )
        if size > _LARGEST_FILE:
            raise BadInput(f"{self.url}/{name}: {size:,} bytes, says the server; no file of a model is so large")
        return size

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes ``start:stop`` of a file, which has them.

        Raises:
            FileNotFoundError: there is no such file.
            ResourceError: it cannot be read.
        """
        if start == stop:
            return b""
        return self._persistently(name, lambda told: self._whole_range(name, start, stop, told))

    @abstractmethod
    def _whole(self, name: str, limit: int, told: OnBytes) -> bytes:
        """At most ``limit`` bytes from the start of a file."""

    @abstractmethod
    def _stated(self, name: str) -> int | None:
        """The size of a file; None if nobody says it."""

    @abstractmethod
    def _range(self, name: str, start: int, stop: int, told: OnBytes) -> bytes:
        """At most the bytes ``start:stop`` of a file."""

    @abstractmethod
    def _passes(self, error: Exception) -> bool:
        """Whether another try may mend it."""

    def _explained(self, name: str, error: Exception) -> Dsv4Error | None:
        """The error in our words; None for a mistake of ours."""
        if isinstance(error, Refused):
            return ResourceError(f"{self.url}/{name}: {error}")
        return ResourceError(
            f"{self.url}/{name}: cannot be read ({_reason(error)}); check network and permissions, then run the same "
            "command again"
        )

    def _whole_range(self, name: str, start: int, stop: int, told: OnBytes) -> bytes:
        found = self._range(name, start, stop, told)
        if len(found) != stop - start:
            raise ConnectionError(f"{len(found):,} of {stop - start:,} bytes came")
        return found

    def _persistently(self, name: str, attempt: Callable[[OnBytes], T]) -> T:
        """Make a request, and make it again after what may have been an accident."""
        for wait in (*WAITS, None):
            try:
                return in_time(attempt)
            except (Dsv4Error, FileNotFoundError, *BUGS):
                raise
            except Exception as error:  # what the implementations of fsspec raise has no common class
                if wait is None or not self._passes(error):
                    if (explained := self._explained(name, error)) is None:
                        raise
                    raise explained from None  # what a library says of it may quote the URL, or the access token
                time.sleep(max(wait, _asked_to_wait(error)))
        raise AssertionError("unreachable")


def in_time(attempt: Callable[[OnBytes], T]) -> T:
    """The result of a request, which runs in a thread of its own and is left behind there if it takes too long.

    Raises:
        TimeoutError: the bytes of which the attempt has told did not come fast enough.
    """
    outcome: Future[T] = Future()
    begun, received = time.monotonic(), 0

    def told(nbytes: int) -> None:
        nonlocal received
        received += nbytes

    def run() -> None:
        try:
            outcome.set_result(attempt(told))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="dsv4-request", daemon=True).start()
    while True:
        left = begun + GRACE_SECONDS + received / SLOWEST - time.monotonic()
        try:
            return outcome.result(max(left, 0))
        except TimeoutError:
            if outcome.done():
                raise
            if left <= 0:
                raise TimeoutError(f"too slow: {received:,} bytes in {time.monotonic() - begun:.0f} seconds") from None


def _reason(error: Exception) -> str:
    """The reason of a failure, in words that hold no URL of a library's."""
    if isinstance(error, HttpStatus | ConnectionError | TimeoutError) and str(error):
        return str(error)
    if type(error).__name__ == "ConnectError":  # of the HTTP client: the system's own words
        return str(error)
    return type(error).__name__ if _is_of_client(error) else str(error) or type(error).__name__


def _asked_to_wait(error: Exception) -> float:
    """The seconds of a ``Retry-After``; 0 without one."""
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HttpStatus) else ""
    return min(float(asked), _LONGEST_WAIT) if re.fullmatch(r"\d{1,9}", asked) else 0.0


class HttpFolder(RemoteFolder):
    """A folder of a web server. A query of its URL, such as a signature, goes with every request."""

    def __init__(self, url: str) -> None:
        """Nothing is fetched yet. Raises :class:`UsageError`: not a URL."""
        super().__init__(url)
        try:
            self._parts = urlsplit(url)
        except ValueError as error:
            raise UsageError(f"{url}: {error}; expected a URL such as https://host/path") from None

    @cached_property
    def _own_client(self) -> Any:
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # of the client: httpx2 in huggingface_hub 2

        return httpx.Client(follow_redirects=True)

    def _client(self) -> Any:
        """The client that makes the requests. Raises :class:`UsageError`: the environment keeps it from being made."""
        try:
            return self._session()
        except OSError as error:
            raise UsageError(f"{self.url}: {error.strerror or error}; check SSL_CERT_FILE and SSL_CERT_DIR") from None
        except Exception as error:
            if (reason := misconfigured(error)) is None:
                raise
            raise UsageError(f"{self.url}: {reason}; set it right, and run the same command again") from None

    def _session(self) -> Any:
        return self._own_client

    def _at(self, name: str) -> str:
        path = f"{self._parts.path.rstrip('/')}/{quote(name)}"
        return urlunsplit(self._parts._replace(path=path, fragment=""))

    def _headers(self) -> dict[str, str]:
        return {}

    def _is_absent(self, response: Any) -> bool:
        """Whether a refusal says that there is no such file."""
        return response.status_code in _ABSENT

    def _get(self, url: str, told: OnBytes, *, limit: int, span: tuple[int, int] | None = None) -> Answer:
        headers = {**self._headers(), **({} if span is None else {"Range": f"bytes={span[0]}-{span[1] - 1}"})}
        try:
            return get(self._client(), url, headers, told, limit=limit)
        except HttpStatus as refusal:
            if self._is_absent(refusal.response):
                raise FileNotFoundError(str(refusal)) from None
            raise

    def _whole(self, name: str, limit: int, told: OnBytes) -> bytes:
        return self._get(self._at(name), told, limit=limit).content

    def _stated(self, name: str) -> int | None:
        return self._get(self._at(name), lambda _: None, limit=1, span=(0, 1)).size

    def _range(self, name: str, start: int, stop: int, told: OnBytes) -> bytes:
        answer = self._get(self._at(name), told, limit=stop - start, span=(start, stop))
        if answer.first != start:
            raise Refused(
                "the server does not send the range that was asked for, and files are read by ranges; download the "
                "folder and give its path, or serve it from a server that has them"
            )
        return answer.content

    def _passes(self, error: Exception) -> bool:
        if isinstance(error, HttpStatus):
            return error.status in _PASSING
        return isinstance(error, ConnectionError | TimeoutError) or _is_of_transport(error)

    def _explained(self, name: str, error: Exception) -> Dsv4Error | None:
        if isinstance(error, HttpStatus) and error.status in _DENIED:
            return BadInput(
                f"{self.url}/{name}: the server refuses access ({error}); check the URL, and the signature or password "
                "in it"
            )
        ours = (HttpStatus, Refused, ConnectionError, TimeoutError)
        return super()._explained(name, error) if isinstance(error, ours) or _is_of_client(error) else None


def _is_of_client(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2")


def _is_of_transport(error: Exception) -> bool:
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    never = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)
    return isinstance(error, httpx.TransportError) and not isinstance(error, never)


def get(client: Any, url: str, headers: Mapping[str, str], told: OnBytes, *, limit: int) -> Answer:
    """One request, whose answer is read up to ``limit`` bytes and then left.

    Raises:
        HttpStatus: the server refuses.
        Refused: it is sent compressed, although that was not asked for.
    """
    from huggingface_hub import constants

    plain = {**headers, "Accept-Encoding": "identity"}
    with client.stream("GET", url, headers=plain, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        if response.status_code not in (200, 206):
            raise HttpStatus(response)
        if (coding := response.headers.get("Content-Encoding", "")) not in ("", "identity"):
            raise Refused(
                f"the server sends it compressed ({coding[:20]}), although the bytes as they are were asked for; turn "
                "compression off there, or download the folder and give its path"
            )
        content = bytearray()
        for part in response.iter_raw():
            content += part[: limit - len(content)]
            told(len(part))
            if len(content) >= limit:
                break
        stated = response.headers.get("Content-Length", "")
        first = re.match(r"bytes (\d{1,20})-", sent := response.headers.get("Content-Range", ""))
        if response.status_code == 206:
            stated = sent.rpartition("/")[2]
        return Answer(
            content=bytes(content),
            size=int(stated) if re.fullmatch(r"\d{1,20}", stated) else None,
            first=int(first[1]) if first is not None else 0,
            following=response.links.get("next", {}).get("url"),
        )


def misconfigured(error: BaseException) -> str | None:
    """The setting of the environment that keeps the client from asking at all; None if ``error`` is something else.

    No value is quoted, as the URLs of proxies hold passwords.
    """
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    if isinstance(error, httpx.InvalidURL):
        return "HF_ENDPOINT, or the proxy in HTTPS_PROXY or ALL_PROXY, is not a URL"
    if type(error) is ValueError and "proxy" in str(error):
        return "the proxy in HTTPS_PROXY or ALL_PROXY is of a kind that the client does not know"
    if isinstance(error, ImportError) and "socksio" in str(error):
        return "the SOCKS proxy in HTTPS_PROXY or ALL_PROXY needs the package socksio, which is not installed"
    return None


class BucketFolder(RemoteFolder):
    """A prefix of a bucket, or whatever else fsspec has a file system for."""

    def __init__(self, url: str) -> None:
        """Nothing is fetched yet.

        Raises:
            UsageError: a kind of URL that fsspec does not know, or whose package is not installed.
        """
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        super().__init__(url)
        try:
            self._system, root = url_to_fs(url)
        except ImportError as error:
            install = ": pip install 'dsv4-convert[gs]'" if url.startswith("gs://") else ""
            raise UsageError(f"{self.url}: {error}{install}") from None
        except ValueError as error:
            raise UsageError(f"{self.url}: {error}; expected a folder, or a URL such as gs://… or https://…") from None
        except BUGS:
            raise
        except Exception as error:  # a file system that connects at once
            raise ResourceError(f"{self.url}: cannot be reached ({_reason(error)}); check the URL") from None
        self._root = root.rstrip("/")

    def files(self) -> dict[str, tuple[int, str]]:
        """Size of each file of the folder, and a text that changes when the file does.

        Raises:
            BadInput: there is no such folder.
            ResourceError: it cannot be listed.
        """
        try:
            entries = self._persistently("", lambda _: self._system.ls(self._root, detail=True, refresh=True))
        except FileNotFoundError:
            raise BadInput(f"{self.url}: no such folder in the bucket; check the path and the permissions") from None
        files = [entry for entry in entries if entry["type"] == "file"]
        return {entry["name"].rpartition("/")[2]: (entry["size"], self._system.ukey(entry["name"])) for entry in files}

    def create(self, name: str, content: bytes) -> bool:
        """Make a file that is not there yet; False if it is there. One of two processes that try succeeds."""
        try:
            in_time(lambda _: self._system.pipe_file(f"{self._root}/{name}", content, mode="create"))
        except FileExistsError:
            return False
        return True

    def _whole(self, name: str, limit: int, told: OnBytes) -> bytes:
        size = self._stated(name)
        return self._range(name, 0, limit if size is None else min(size, limit), told)

    def _stated(self, name: str) -> int | None:
        size = self._system.size(f"{self._root}/{name}")
        return None if size is None else int(size)

    def _range(self, name: str, start: int, stop: int, told: OnBytes) -> bytes:
        told(stop - start)  # it comes at once
        return bytes(self._system.cat_file(f"{self._root}/{name}", start=start, end=stop))

    def _passes(self, error: Exception) -> bool:
        return not isinstance(error, PermissionError | ValueError)
