"""A Hub that refuses, fails, stalls, cuts, moves or lies; the client is the real one, the server a loopback one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from dsv4_convert.files import remote
from tests.checkpoint.hub_server import LoopbackHub, serving
from tests.files.odd_answers import UNBOUNDED, Answer, saying

from .case import SHARD, SHARDS, TOKEN, Case, Place, Step, Words, accepted, invoke, refused
from .checks import equals_healthy

REPO = "acme/tiny"
FIRST, SECOND = "1" * 40, "2" * 40
_INDEX = "model.safetensors.index.json"
_ROOT = Path(__file__).parents[2]

DOWNLOAD: Words = ("download", REPO)
TO_FOLDER: Words = ("download", REPO, "--local-dir", "{dest}")
FROM_HUB: Words = ("convert", "hf-to-orbax", REPO, "{dest}")
PLAN_HUB: Words = (*FROM_HUB, "--dry-run")
RECORD_HUB: Words = ("golden", "record", REPO, "--out", "{dest}", "--random", "3")
#: Everything that goes to the Hub.
_ALL = (DOWNLOAD, TO_FOLDER, FROM_HUB, PLAN_HUB, RECORD_HUB)

Arrange = Callable[[LoopbackHub], object]


def _answering(part: str, answer: Any) -> Arrange:
    """The Hub answers a question so."""

    def arrange(hub: Any) -> None:
        hub.odd[part] = answer

    return arrange


def _served(*arrange: Arrange, token: bool = True) -> Callable[[Place], None]:
    """The healthy checkpoint as a repository, and what is then done to it; our token is set in the environment."""

    def edit(place: Place) -> None:
        place.hub = hub = place.stack.enter_context(serving(place.root))
        if token:
            os.environ["HF_TOKEN"] = TOKEN  # put back when the Hub is closed
        hub.add(REPO, FIRST, {file.name: file.read_bytes() for file in place.healthy.iterdir()})
        for one in arrange:
            one(hub)

    return edit


def _set(**values: Any) -> Arrange:
    return lambda hub: vars(hub).update(values)


def _fails(part: str, status: int) -> Arrange:
    return lambda hub: hub.failures.update({part: status})


def _fails_at_first(part: str, *statuses: int) -> Arrange:
    return lambda hub: hub.passing_failures.update({part: list(statuses)})


def _file(name: str, change: Callable[[Any], object]) -> Arrange:
    return lambda hub: change(hub.commits[REPO][FIRST][name])


def _damaged(file: Any) -> None:
    """One bit of what is sent is another one; size and hash are stated as they were."""
    content = bytearray(file.content)
    content[-1] ^= 1
    file.sent = bytes(content)


def _without(name: str) -> Arrange:
    return lambda hub: hub.commits[REPO][FIRST].pop(name)


def _listing(name: str) -> Arrange:
    """A name in the listing of the repository that is not one of a file in a folder."""
    entry = {
        "type": "file",
        "oid": "a" * 40,
        "size": 5,
        "path": name,
        "lfs": {"oid": "b" * 64, "size": 5, "pointerSize": 9},
    }
    return lambda hub: hub.also_listed.append(entry)


def _nothing_beside(place: Place) -> None:
    """Nothing was written but in the cache and at the destination."""
    found = {path.name for path in place.root.iterdir()}
    assert found <= {"hub", "harnesses.json", "dest", "token"}, found
    names = {file.name for folder in ("hub", "dest") for file in (place.root / folder).rglob("*.safetensors")}
    assert names <= set(SHARDS), names


def _other_host(place: Place) -> None:
    """Large files are on a second server, at another port, which takes down what it is sent."""
    _served(_set(required_token=TOKEN))(place)
    assert place.hub is not None
    other = LoopbackHub(commits=place.hub.commits, branches=place.hub.branches)
    place.stack.callback(other.close)
    place.hub.large_files_at = other.endpoint
    place.other = other  # type: ignore[attr-defined]


def _no_token_there(place: Place) -> None:
    other: LoopbackHub = place.other  # type: ignore[attr-defined]
    assert other.requests, "nothing was asked for there, so nothing is shown"
    assert {request.token for request in other.requests} == {None}
    assert place.hub is not None
    assert {request.token for request in place.hub.requests} == {TOKEN}


def _resumed(place: Place) -> None:
    """The rest of the file was asked for, not all of it."""
    assert place.hub is not None
    assert f"{SHARD}+" in place.hub.fetched()
    assert "bytes=20000-" in [request.range for request in place.hub.requests]


@contextmanager
def _small_pieces(place: Place) -> Iterator[None]:
    from huggingface_hub import constants

    with patch.object(constants, "DOWNLOAD_CHUNK_SIZE", 10_000):  # the client keeps whole pieces, of 10 MB
        yield


@contextmanager
def _impatient(place: Place) -> Iterator[None]:
    """Half a second where the client waits for ten."""
    from huggingface_hub import close_session, constants

    with patch.object(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3), patch.object(constants, "HF_HUB_ETAG_TIMEOUT", 0.3):
        close_session()
        yield


@contextmanager
def _offline(place: Place) -> Iterator[None]:
    from huggingface_hub import constants

    with patch.object(constants, "HF_HUB_OFFLINE", True):
        yield


@contextmanager
def _with_password(place: Place) -> Iterator[None]:
    """The address of the Hub holds an access token, as a password."""
    from huggingface_hub import constants

    with patch.object(constants, "ENDPOINT", constants.ENDPOINT.replace("//", f"//me:{TOKEN}@")):
        yield


@contextmanager
def _full_disk(place: Place) -> Iterator[None]:
    usage = shutil.disk_usage(place.root)._replace(free=10_000)
    with patch.object(shutil, "disk_usage", lambda path: usage), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the client warns of it, and goes on
        yield


def _moved(place: Place) -> None:
    """A conversion was interrupted, and the branch has moved since."""
    _served(_file(SHARDS[3], _damaged))(place)
    assert place.hub is not None
    assert invoke(place.words(FROM_HUB)).code == 3
    place.hub.commits[REPO][FIRST][SHARDS[3]].sent = None
    assert (place.root / "dest.dsv4-partial").is_dir()
    tampered = {name: file.content for name, file in place.hub.commits[REPO][FIRST].items()}
    tampered["tokenizer.json"] = b"{}"
    place.hub.add(REPO, SECOND, tampered)


def _other_content(place: Place) -> None:
    """A shard was fetched in part; the same commit then has another content of it."""
    _served(_fails(SHARDS[3], 500))(place)
    assert place.hub is not None
    assert invoke(place.words(DOWNLOAD)).code == 4
    place.hub.failures.clear()
    _damaged(place.hub.commits[REPO][FIRST][SHARDS[3]])


def _downloaded(place: Place) -> None:
    _served()(place)
    assert invoke(place.words(DOWNLOAD)).code == 0


def _everything_said(place: Place) -> None:
    """With all of the client's own messages on, in a process of its own, the token is in none, nor in any file."""
    _served(_set(required_token=TOKEN))(place)
    assert place.hub is not None
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    told = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    home = {"HF_ENDPOINT": place.hub.endpoint, "HF_HOME": str(place.root / "home"), "PYTHONPATH": str(_ROOT)}
    words = [sys.executable, "-m", "dsv4_convert", *place.words(FROM_HUB)]
    done = subprocess.run(words, capture_output=True, text=True, env=clean | told | home, check=False)
    assert done.returncode == 0, done.stderr
    assert "GET" in done.stderr, "nothing was said, so nothing is shown"
    assert TOKEN not in done.stdout + done.stderr
    assert {request.token for request in place.hub.requests} == {TOKEN, None}


@contextmanager
def _hasty(place: Place) -> Iterator[None]:
    """A second where a request may take half a minute."""
    with _impatient(place), patch.object(remote, "GRACE_SECONDS", 1.0), patch.object(remote, "WAITS", ()):
        yield


_PAGE = b"<!DOCTYPE html><html><body>Log in</body></html>"
_ODD: dict[str, tuple[str, Answer]] = {
    "a login page, whatever is asked": ("/", saying(_PAGE)),
    "a login page for the listing": ("/tree/", saying(_PAGE)),
    "no commit": ("/revision/", saying({"id": REPO})),
    "a list where an object is expected": ("/revision/", saying(["sha"])),
    "an object where a list is expected": ("/tree/", saying({"files": []})),
    "entries that are strings": ("/tree/", saying(["config.json"])),
    "a file without a size": ("/tree/", saying([{"type": "file", "path": "config.json", "oid": "a" * 40}])),
    "a page that is on another server": ("/tree/", saying([], Link='<http://localhost:9/next>; rel="next"')),
    "pages without an end": ("/tree/", saying([], Link=f'</api/models/{REPO}/tree/{FIRST}>; rel="next"')),
}

_HOSTILE = {
    "the folder above": "../evil.safetensors",
    "an absolute path": "/etc/evil.safetensors",
    "backslashes": "..\\evil.safetensors",
    "a URL": "https://evil.example/evil.safetensors",
    "a NUL": "evil\0.safetensors",
    "5,000 characters": "x" * 5000 + ".safetensors",
    "a device of Windows": "NUL.safetensors",
    "a line end": "evil\nerror: .safetensors",
}

NETWORK: tuple[Case, ...] = (
    refused(
        "N01",
        "a private repository, without a token",
        f"{REPO}: no such repository, or a private one",
        "set HF_TOKEN",
        edit=_served(_set(required_token="hf_other"), token=False),
        by=_ALL,
    ),
    refused(
        "N01",
        "a private repository, with a wrong token",
        f"{REPO}: no such repository, or a private one",
        "set HF_TOKEN",
        edit=_served(_set(required_token="hf_other")),
        by=(DOWNLOAD, FROM_HUB),
    ),
    refused(
        "N01",
        "a gated repository",
        f"{REPO}: access is gated; accept its terms at http://",
        f"/{REPO}, then set HF_TOKEN",
        edit=_served(_set(required_token="hf_other", gated=True)),
        by=(DOWNLOAD, FROM_HUB),
    ),
    refused(
        "N01",
        "a token that is not accepted",
        f"{REPO}: the Hub does not accept the access token (HTTP 401)",
        "set HF_TOKEN",
        edit=_served(_fails("/api/", 401)),
        by=(DOWNLOAD, FROM_HUB),
    ),
    refused(
        "N01",
        "access refused",
        f"{REPO}: the Hub refuses access (HTTP 403)",
        "set HF_TOKEN",
        edit=_served(_fails("/api/", 403)),
        by=(DOWNLOAD, FROM_HUB),
    ),
    refused(
        "N01",
        "access to a shard refused",
        f"{REPO}: the Hub refuses access (HTTP 403)",
        edit=_served(_fails(SHARD, 403)),
        by=(DOWNLOAD, FROM_HUB),
    ),
    refused(
        "N01",
        "no such repository",
        "acme/nothing: no such repository, or a private one; check the name",
        edit=_served(),
        by=(("download", "acme/nothing"), ("convert", "hf-to-orbax", "acme/nothing", "{dest}")),
    ),
    refused(
        "N01",
        "no such revision",
        f"{REPO}: no revision 'v9'; give a branch, a tag or a commit",
        edit=_served(),
        by=((*DOWNLOAD, "--revision", "v9"), (*FROM_HUB, "--revision", "v9")),
    ),
    refused(
        "N01",
        "a shard of the index that the repository has not",
        f"{REPO} at main (commit {FIRST}): 1 of 5 shards are missing",
        SHARD,
        edit=_served(_without(SHARD)),
        by=(DOWNLOAD, FROM_HUB),
    ),
    refused(
        "N01",
        "a shard that is listed and not there",
        REPO,
        "HTTP 404",
        edit=_served(_fails(f"/cdn/{REPO}/{FIRST}/{SHARD}", 404)),
        by=(DOWNLOAD, FROM_HUB),
    ),
    refused(
        "N01",
        "a repository without a model",
        f"{REPO} at main (commit {FIRST}): no config.json",
        "check the repository's name",
        edit=_served(_without("config.json")),
        by=(DOWNLOAD, FROM_HUB),
    ),
    refused(
        "N01",
        "not the name of a repository",
        "a/b/c: no such folder, and not a repository such as",
        edit=_served(),
        by=(("convert", "hf-to-orbax", "a/b/c", "{dest}"),),
    ),
    *(
        refused(
            "N02",
            f"every answer is {status}",
            REPO,
            says,
            code=4,
            edit=_served(_fails("/api/", status)),
            by=(DOWNLOAD, FROM_HUB),
        )
        for status, says in (
            (429, "the Hub asks to slow down (HTTP 429); try again in some minutes"),
            (500, "the Hub fails (HTTP 500); run the same command again later"),
            (503, "the Hub fails (HTTP 503)"),
        )
    ),
    *(
        refused(
            "N02",
            f"every answer for a shard is {status}",
            REPO,
            f"(HTTP {status})",
            "again",
            code=4,
            edit=_served(_fails(SHARD, status)),
            by=(DOWNLOAD, FROM_HUB),
        )
        for status in (429, 502)
    ),
    *(
        accepted(
            "N02",
            f"the first answers for {what} are {', '.join(map(str, statuses))}, {doing}",
            edit=_served(_fails_at_first(part, *statuses)),
            by=(words,),
            after=after,
        )
        for what, part, statuses in (
            ("a shard", SHARD, (503, 429)),
            ("the index", _INDEX, (500,)),
            ("the listing", "/tree/", (503,)),
            ("the revision", "/revision/", (502,)),
        )
        for doing, words, after in (
            ("converting", FROM_HUB, equals_healthy),
            ("downloading", DOWNLOAD, _nothing_beside),
        )
    ),
    Case(
        id="N03",
        what="a server that stops sending",
        slow=True,
        edit=_served(lambda hub: hub.stalls.update({SHARD: 20_000})),
        during=_impatient,
        steps=tuple(
            Step(
                words,
                4,
                (REPO, "cannot be reached (ReadTimeout)", "run the same command again: finished files are kept"),
            )
            for words in (DOWNLOAD, FROM_HUB)
        ),
    ),
    accepted(
        "N04",
        "a connection that breaks within a shard",
        edit=_served(lambda hub: hub.cuts.update({SHARD: 20_000})),
        by=(DOWNLOAD,),
        during=_small_pieces,
        after=_resumed,
    ),
    accepted(
        "N04",
        "a connection that breaks within a shard, while it is converted",
        edit=_served(lambda hub: hub.cuts.update({SHARD: 20_000})),
        by=(FROM_HUB,),
        during=_small_pieces,
        after=equals_healthy,
    ),
    refused(
        "N05",
        "the branch moved since the interrupted run",
        "an unfinished conversion with other settings is here",
        FIRST,
        SECOND,
        "--restart to discard it",
        code=2,
        edit=_moved,
        by=(FROM_HUB,),
        resumed=True,
    ),
    accepted(
        "N05",
        "the branch moved, and the former commit is asked for",
        edit=_moved,
        by=((*FROM_HUB, "--revision", FIRST),),
        after=equals_healthy,
    ),
    refused(
        "N05",
        "the same commit has another content now",
        f"{REPO} at {FIRST}: 1 of 7 files are not what the Hub states",
        SHARDS[3],
        "expected sha256",
        "they are kept with .wrong after their names",
        edit=_other_content,
        by=(DOWNLOAD,),
    ),
    *(
        refused(
            "N06",
            f"{name} of the right size and with a wrong hash",
            name,
            "expected sha",
            "found",
            edit=_served(_file(name, _damaged)),
            by=words,
        )
        for name, words in ((SHARD, (DOWNLOAD, FROM_HUB, RECORD_HUB)), ("config.json", (DOWNLOAD,)))
    ),
    Case(
        id="N06",
        what="a folder with a shard of a wrong hash, which does not pass for a checkpoint afterwards",
        edit=_served(_file(SHARD, _damaged)),
        steps=(
            Step(TO_FOLDER, 3, (SHARD, "expected sha256", "run the same command to download them again")),
            Step(("convert", "hf-to-orbax", "{dest}", "{root}/orbax"), 3, ("{dest}: 1 of 5 shards are missing", SHARD)),
        ),
    ),
    accepted(
        "N07",
        "offline, with everything in the cache",
        edit=_downloaded,
        during=_offline,
        by=(FROM_HUB,),
        after=equals_healthy,
    ),
    refused(
        "N07",
        "offline, with nothing in the cache",
        REPO,
        "not in the cache, and the Hub is off limits; unset HF_HUB_OFFLINE once",
        code=4,
        edit=_served(),
        during=_offline,
        by=(DOWNLOAD, FROM_HUB, RECORD_HUB),
    ),
    refused(
        "N07",
        "nobody listens",
        REPO,
        "cannot be reached (",
        "check network, proxy and HF_ENDPOINT",
        code=4,
        edit=_served(lambda hub: hub.close()),
        by=(DOWNLOAD, FROM_HUB),
    ),
    Case(
        id="N08",
        what="a redirect to another host, which must not get the token",
        edit=_other_host,
        steps=(Step(FROM_HUB, 0), Step(DOWNLOAD, 0)),
        after=_no_token_there,
    ),
    accepted(
        "N08",
        "a redirect on the same host, as of a repository that moved",
        edit=_served(_set(required_token=TOKEN, moved={"acme/former": REPO})),
        by=(("convert", "hf-to-orbax", "acme/former", "{dest}"),),
        after=equals_healthy,
    ),
    refused(
        "N08",
        "a password in HF_ENDPOINT, of a Hub that does not answer",
        f"{REPO} at main: http://…@127.0.0.1:",
        "cannot be reached",
        code=4,
        edit=_served(lambda hub: hub.close()),
        during=_with_password,
        by=(DOWNLOAD, FROM_HUB),
    ),
    refused(
        "N08",
        "a password in HF_ENDPOINT, of a repository that is gated",
        f"{REPO}: access is gated; accept its terms at http://…@127.0.0.1:",
        edit=_served(_set(required_token="hf_other", gated=True)),
        during=_with_password,
        by=(DOWNLOAD, FROM_HUB),
    ),
    Case(id="N08", what="all messages of the client, and all files", steps=(), edit=_everything_said, slow=True),
    *(
        refused(
            "N08",
            f"a token with {what}",
            "the access token has characters that cannot be sent",
            "set HF_TOKEN again",
            code=2,
            edit=lambda place, token=token: (_served()(place), os.environ.update(HF_TOKEN=token)),
            by=(DOWNLOAD, FROM_HUB),
        )
        for what, token in (("an accent", f"{TOKEN}é"), ("a blank", f"{TOKEN} x"))
    ),
    refused(
        "N09",
        "a disk that is too small",
        "bytes are still to be downloaded, 10,000 are free",
        "make room",
        code=4,
        edit=_served(),
        during=_full_disk,
        by=(DOWNLOAD, RECORD_HUB),
    ),
    refused(
        "N09",
        "a disk that is too small for the conversion",
        "{dest}: the conversion needs",
        "10,000 are free there",
        "Make room",
        code=4,
        edit=_served(),
        during=_full_disk,
        by=(FROM_HUB,),
    ),
    *(
        accepted(
            "N10",
            f"a file in the listing whose name is {what}, beside those of the model",
            edit=_served(_listing(name)),
            by=(TO_FOLDER,),
            after=_nothing_beside,
        )
        for what, name in _HOSTILE.items()
    ),
    *(
        refused(
            "N10",
            f"a repository of one file whose name is {what}",
            REPO,
            "expected model.safetensors.index.json or one .safetensors file",
            edit=_served(
                lambda hub: [hub.commits[REPO][FIRST].pop(name) for name in (_INDEX, *SHARDS)], _listing(name)
            ),
            by=(DOWNLOAD,),
        )
        for what, name in _HOSTILE.items()
        if name not in ("NUL.safetensors",) and len(name) < 200
    ),
    *(
        refused(
            "N11",
            what,
            "http://127.0.0.1:",
            "does not answer like the Hub: the ",
            "expected",
            "check HF_ENDPOINT",
            edit=_served(_answering(*odd)),
            by=_ALL,
        )
        for what, odd in _ODD.items()
    ),
    *(
        refused(
            "N12",
            f"{part}: {what}",
            "127.0.0.1" if what == "one byte at a time" else REPO,
            code=code[part == "config.json"],
            edit=_served(_answering(part, UNBOUNDED[what][0])),
            during=_hasty,
            by=(DOWNLOAD, FROM_HUB),
        )
        for what, code in {
            "endless": (3, 3),
            "2^60 bytes": (3, 3),
            "a gzip bomb": (4, 4),
            "one byte at a time": (4, 4),
            "silence": (4, 4),
        }.items()
        for part in ("/tree/", "config.json")
    ),
)
