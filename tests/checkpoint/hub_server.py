"""A Hugging Face Hub on the loopback interface: the endpoints that the real client calls for a model's files.

Every file has metadata (what the Hub states about it) and content (what is sent); a test that makes them differ, cuts a
transfer or refuses a request plays a fault. All requests are recorded.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qs, unquote, urlsplit

_PAGE = 3  # entries per page of a listing, where the real Hub has 1000


@dataclass(kw_only=True)
class HubFile:
    """One file of a repository. Safetensors files are in LFS, others in git, unless said otherwise."""

    name: str
    content: bytes
    lfs: bool | None = None
    #: What is sent instead of the content, while size and hash stay those of the content.
    sent: bytes | None = None

    def __post_init__(self) -> None:
        if self.lfs is None:
            self.lfs = self.name.endswith(".safetensors")

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.content).hexdigest() if self.lfs else self.git_oid

    def entry(self) -> dict[str, Any]:
        """As a line of the listing."""
        entry = {"type": "file", "oid": self.git_oid, "size": len(self.content), "path": self.name}
        if self.lfs:
            entry["lfs"] = {"oid": self.etag, "size": len(self.content), "pointerSize": 134}
        return entry


@dataclass(frozen=True, kw_only=True)
class Request:
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class LoopbackHub:
    """The server and its state. Repository -> revision -> files; a branch is one more name for a commit."""

    commits: dict[str, dict[str, dict[str, HubFile]]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    #: The only token that is accepted; None lets everybody in.
    required_token: str | None = None
    #: With a required token: repositories are visible, their files are not.
    gated: bool = False
    #: File name -> bytes after which the connection is cut, once.
    cuts: dict[str, int] = field(default_factory=dict)
    #: Part of a path -> status of the answer, for every request.
    failures: dict[str, int] = field(default_factory=dict)
    #: Part of a path -> statuses of the answers to the next requests for it, after which it is answered rightly.
    passing_failures: dict[str, list[int]] = field(default_factory=dict)
    #: File name -> bytes after which nothing more comes, although the connection stays.
    stalls: dict[str, int] = field(default_factory=dict)
    #: Part of a path -> what answers every GET for it instead.
    odd: dict[str, Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=dict)
    #: Further entries of every listing, as they are.
    also_listed: list[dict[str, Any]] = field(default_factory=list)
    #: Former names of repositories, with those that requests are sent on to.
    moved: dict[str, str] = field(default_factory=dict)
    #: Where large files are. None: :attr:`cdn`.
    large_files_at: str | None = None
    #: The query of their URLs.
    signature: str = ""
    requests: list[Request] = field(default_factory=list)
    #: Whether requests for a range are honoured.
    ranges: bool = True
    #: Large files that were uploaded, by their SHA-256, and not yet committed.
    uploaded: dict[str, bytes] = field(default_factory=dict)
    #: Repositories that were made by a client, with what it asked for.
    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: Bytes of content that were sent of each file.
    sent: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def cdn(self) -> str:
        """The same server under another host name, to which the client must not send its token."""
        return f"http://localhost:{self._server.server_address[1]}"

    def add(self, repo_id: str, commit: str, files: dict[str, bytes], *, branch: str = "main") -> dict[str, HubFile]:
        """Add a commit and point a branch at it. Returns the files, to be tampered with."""
        made = {name: HubFile(name=name, content=content) for name, content in files.items()}
        self.commits.setdefault(repo_id, {})[commit] = made
        self.branches.setdefault(repo_id, {})[branch] = commit
        return made

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for, in order; with a ``+`` where a transfer was resumed."""
        return [
            request.path.rpartition("/")[2] + ("+" if request.range else "")
            for request in self.requests
            if request.method == "GET" and ("/resolve/" in request.path or "/cdn/" in request.path)
        ]

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed leave without a word."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet, or the client's delayed acknowledgements cost 40 ms each

        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._take()

        def do_PUT(self) -> None:
            self._take()

        def _take(self) -> None:
            """A client that writes: a new repository, its questions before an upload, large files, commits."""
            path = unquote(urlsplit(self.path).path)
            body = self._body()
            authorization = self.headers.get("Authorization")
            token = authorization.removeprefix("Bearer ") if authorization else None
            hub.requests.append(Request(method=self.command, path=path, range=None, token=token))
            status = next((status for part, status in hub.failures.items() if part in path), None)
            passing = next((left for part, left in hub.passing_failures.items() if part in path and left), None)
            if status is None and passing is not None:
                status = passing.pop(0)
            if status is not None:
                return self._send(status, {})
            if match := re.fullmatch(r"/upload/([0-9a-f]{64})", path):
                assert hashlib.sha256(body).hexdigest() == match[1]
                hub.uploaded[match[1]] = body
                return self._send(200, {})
            if token is None or token != hub.required_token:
                return self._send(401, {"X-Error-Message": "Invalid username or password."})
            if path == "/api/repos/create":
                asked = json.loads(body)
                prefix = "datasets/" if asked.get("type") == "dataset" else ""
                repo_id = f"{asked.get('organization', 'me')}/{asked['name']}"
                if prefix + repo_id in hub.commits:
                    return self._send(409, {}, {"url": f"{hub.endpoint}/{prefix}{repo_id}"})
                hub.made[prefix + repo_id] = asked
                hub.add(prefix + repo_id, hashlib.sha1(repo_id.encode()).hexdigest(), {})
                return self._send(200, {}, {"url": f"{hub.endpoint}/{prefix}{repo_id}", "name": repo_id})
            if path == "/api/validate-yaml":
                return self._send(200, {}, {"errors": [], "warnings": []})
            if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
                objects = [
                    {**each, "actions": {"upload": {"href": f"{hub.endpoint}/upload/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ]
                return self._send(200, {}, {"transfer": "basic", "objects": objects})
            if match := re.fullmatch(r"/api/(models|datasets)/(.+)/(preupload|commit)/([^/]+)", path):
                kind, repo_id, what, revision = match.groups()
                repo = repo_id if kind == "models" else f"datasets/{repo_id}"
                if revision not in hub.branches.get(repo, {}):
                    return self._send(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
                if what == "commit":
                    return self._commit_files(repo, revision, [json.loads(line) for line in body.splitlines()])
                held = hub.commits[repo][hub.branches[repo][revision]]
                asked = json.loads(body)["files"]
                return self._send(200, {}, {"files": [self._mode(file["path"], file["size"], held) for file in asked]})
            return self._send(404, {})

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _mode(self, name: str, size: int, held: dict[str, HubFile]) -> dict[str, Any]:
            """How a file is to be sent, and the hash of the one that is there."""
            large = size > 1000 or name.endswith(".safetensors")
            return {
                "path": name,
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": False,
                "oid": held[name].etag if name in held else None,
            }

        def _commit_files(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> None:
            files = dict(hub.commits[repo][hub.branches[repo][branch]])
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    content = base64.b64decode(value["content"])
                    files[value["path"]] = HubFile(name=value["path"], content=content, lfs=False)
                elif line["key"] == "lfsFile":
                    content = hub.uploaded[value["oid"]]
                    files[value["path"]] = HubFile(name=value["path"], content=content, lfs=True)
            commit = hashlib.sha1(f"{hub.branches[repo][branch]}{sorted(files)}".encode()).hexdigest()
            hub.commits[repo][commit] = files
            hub.branches[repo][branch] = commit
            self._send(200, {}, {"commitOid": commit, "commitUrl": f"{hub.endpoint}/{repo}/commit/{commit}"})

        def _answer(self) -> None:
            url = urlsplit(self.path)
            path = unquote(url.path)
            authorization = self.headers.get("Authorization")
            token = authorization.removeprefix("Bearer ") if authorization else None
            hub.requests.append(Request(method=self.command, path=path, range=self.headers.get("Range"), token=token))
            status = next((status for part, status in hub.failures.items() if part in path), None)
            passing = next((left for part, left in hub.passing_failures.items() if part in path and left), None)
            if status is None and passing is not None:
                status = passing.pop(0)
            if status is not None:
                return self._send(status, {})
            for part, answer in hub.odd.items():
                if part in path and self.command == "GET":
                    with contextlib.suppress(ConnectionError):
                        answer(self)
                    self.close_connection = True
                    return None
            for former, name in hub.moved.items():
                if former in path:
                    return self._send(307, {"Location": self.path.replace(former, name)})
            if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                return self._api(f"datasets/{match[1]}", None, match[2] or "main", url.query, token)
            if match := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/(.+))?", path):
                repo_id, what, revision = match.groups()
                return self._api(repo_id, what, revision or "main", url.query, token)
            if match := re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path):
                return self._resolve(match[1], match[2], match[3], token)
            if match := re.fullmatch(r"/cdn/(.+?)/([0-9a-f]{40})/(.+)", path):
                return self._content(hub.commits[match[1]][match[2]][match[3]])
            return self._send(404, {})

        def _commit(self, repo_id: str, revision: str, token: str | None, *, files: bool) -> str | None:
            """The commit asked for; None once a refusal was sent."""
            if token != hub.required_token and hub.required_token is not None:
                if not hub.gated:
                    self._send(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
                    return None
                if files:
                    self._send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
                    return None
            if repo_id not in hub.commits:
                self._send(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
                return None
            commit = hub.branches[repo_id].get(revision, revision)
            if commit not in hub.commits[repo_id]:
                self._send(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
                return None
            return commit

        def _api(self, repo_id: str, what: str | None, revision: str, query: str, token: str | None) -> None:
            commit = self._commit(repo_id, revision, token, files=False)
            if commit is None:
                return None
            files = list(hub.commits[repo_id][commit].values())
            if what != "tree":
                return self._send(200, {}, {"id": repo_id, "sha": commit, "siblings": []})
            entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "inference"}]
            entries += [file.entry() for file in files if "/" not in file.name]
            entries += hub.also_listed
            start = int(parse_qs(query).get("cursor", ["0"])[0])
            headers = {}
            if start + _PAGE < len(entries):
                page = f"{hub.endpoint}{urlsplit(self.path).path}?cursor={start + _PAGE}"
                headers["Link"] = f'<{page}>; rel="next"'
            return self._send(200, headers, entries[start : start + _PAGE])

        def _resolve(self, repo_id: str, revision: str, name: str, token: str | None) -> None:
            commit = self._commit(repo_id, revision, token, files=True)
            if commit is None:
                return None
            file = hub.commits[repo_id][commit].get(name)
            if file is None:
                return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            headers = {"X-Repo-Commit": commit, "ETag": f'"{file.git_oid}"'}
            if file.lfs:  # large files are on another host, behind a redirect
                headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
                base = hub.cdn if hub.large_files_at is None else hub.large_files_at
                return self._send(302, headers | {"Location": f"{base}/cdn/{repo_id}/{commit}/{name}{hub.signature}"})
            return self._content(file, headers)

        def _content(self, file: HubFile, headers: dict[str, str] | None = None) -> None:
            content = file.content if file.sent is None else file.sent
            start, stop, status = 0, len(content), 200
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if asked is not None and hub.ranges:
                start, stop = int(asked[1]), min(stop, int(asked[2] or stop) + 1)
                headers = (headers or {}) | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
                status = 206
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            if self.command == "HEAD":
                return
            stall = hub.stalls.get(file.name)
            if stall is not None and start + stall < stop:
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(content[start : start + stall])
                    self.wfile.flush()
                hub._closing.wait(60)
                self.close_connection = True
                return
            cut = hub.cuts.pop(file.name, None)
            with contextlib.suppress(ConnectionError):  # a client that has enough leaves
                self.wfile.write(content[start : stop if cut is None else min(stop, cut)])
            hub.sent[file.name] = hub.sent.get(file.name, 0) + stop - start
            self.close_connection = self.close_connection or cut is not None

        def _send(self, status: int, headers: dict[str, str], body: Any = None) -> None:
            content = b"" if body is None else json.dumps(body).encode()
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    return Handler


def client_constants(endpoint: str, folder: Path) -> dict[str, object]:
    """Values of ``huggingface_hub.constants`` with which the client uses ``endpoint`` and an empty cache in ``folder``.

    The client reads its environment once, on import, so its constants are replaced and not the environment.
    """
    # A list that the client fetches once a day, by whichever request comes first.
    harnesses = folder / "harnesses.json"
    harnesses.write_text('{"standardEnvVars": [], "harnesses": {}}', encoding="utf-8")
    return {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_URL_HOSTS": frozenset({"127.0.0.1"}),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_TOKEN_PATH": str(folder / "token"),
        "AGENT_HARNESSES_PATH": str(harnesses),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[LoopbackHub]:
    """A loopback Hub that the Hub client of this process talks to, with an empty cache in ``folder`` and no token."""
    from huggingface_hub import close_session, constants

    server = LoopbackHub()
    unset = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
    with contextlib.ExitStack() as stack:
        for name, value in client_constants(server.endpoint, folder).items():
            stack.enter_context(patch.object(constants, name, value))
        # Between its retries.
        stack.enter_context(patch("huggingface_hub.utils._http.time.sleep", lambda seconds: None))
        stack.enter_context(patch.dict(os.environ))
        for name in unset:
            os.environ.pop(name, None)
        close_session()
        try:
            yield server
        finally:
            close_session()
            server.close()
