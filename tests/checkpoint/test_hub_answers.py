"""An odd answer of the Hub is one error that names who answered, and no other server gets the access token."""

from __future__ import annotations

import contextlib
import copy
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dsv4_convert.checkpoint.hub import download
from dsv4_convert.checkpoint.hub_plan import plan_download
from dsv4_convert.checkpoint.locate import open_source
from dsv4_convert.cli import app
from dsv4_convert.errors import BadInput, Dsv4Error
from dsv4_convert.files import remote

from ..files.odd_answers import UNBOUNDED, saying
from .hub_server import LoopbackHub
from .safetensors_files import raw_file, u8_header

REPO, COMMIT = "org/model", "1" * 40
TOKEN = "hf_SecretSecretSecret"
FILES = {
    "config.json": b'{"one": 1}',
    "tokenizer.json": b"{}",
    "model.safetensors": raw_file(u8_header({"embed": 100}), bytes(100)),
}


@pytest.fixture
def served(hub: LoopbackHub) -> LoopbackHub:
    hub.add(REPO, COMMIT, FILES)
    return hub


def listing(change: Callable[[list[Any]], object] = lambda entries: None) -> list[Any]:
    """The right listing, changed."""
    hub_files = [
        {"type": "file", "oid": "a" * 40, "size": len(content), "path": name} for name, content in FILES.items()
    ]
    hub_files[2]["lfs"] = {"oid": "b" * 64, "size": hub_files[2]["size"], "pointerSize": 134}
    changed: list[Any] = copy.deepcopy(hub_files)
    change(changed)
    return changed


PAGE = b"<!DOCTYPE html><html><body>Log in</body></html>"
INFO, TREE = "/revision/", "/tree/"
SHAPES: dict[str, tuple[str, object]] = {
    "info is a login page": (INFO, PAGE),
    "the listing is a login page": (TREE, PAGE),
    "everything is a login page": ("/", PAGE),
    "info is empty": (INFO, b""),
    "info has no sha": (INFO, {"id": REPO}),
    "sha is null": (INFO, {"sha": None}),
    "sha is a number": (INFO, {"sha": 7}),
    "sha is short": (INFO, {"sha": "abc"}),
    "sha leads elsewhere": (INFO, {"sha": "../../x"}),
    "info is a list": (INFO, [{"sha": COMMIT}]),
    "info is a string": (INFO, "sha"),
    "info is nested deeply": (INFO, b"[" * 100_000),
    "the listing is an object": (TREE, {"files": listing()}),
    "the listing is null": (TREE, None),
    "entries are strings": (TREE, list(FILES)),
    "entries are null": (TREE, [None]),
    "an entry without type": (TREE, listing(lambda entries: entries[0].pop("type"))),
    "an entry without size": (TREE, listing(lambda entries: entries[0].pop("size"))),
    "a size that is true": (TREE, listing(lambda entries: entries[0].update(size=True))),
    "a size below zero": (TREE, listing(lambda entries: entries[0].update(size=-1))),
    "an entry without oid": (TREE, listing(lambda entries: entries[0].pop("oid"))),
    "oid is null": (TREE, listing(lambda entries: entries[0].update(oid=None))),
    "oid is a number": (TREE, listing(lambda entries: entries[0].update(oid=7))),
    "path is a number": (TREE, listing(lambda entries: entries[0].update(path=7))),
    "lfs is a list": (TREE, listing(lambda entries: entries[2].update(lfs=["b" * 64]))),
    "lfs is null": (TREE, listing(lambda entries: entries[2].update(lfs=None))),
    "lfs without oid": (TREE, listing(lambda entries: entries[2]["lfs"].pop("oid"))),
    "lfs with an oid that is none": (TREE, listing(lambda entries: entries[2]["lfs"].update(oid="../x"))),
    "names that differ by case only": (
        TREE,
        listing(lambda entries: entries.append({**entries[2], "path": "MODEL.safetensors"})),
    ),
    "a name twice": (TREE, listing(lambda entries: entries.append(entries[0]))),
}


@pytest.mark.parametrize("what", SHAPES)
def test_an_odd_answer_is_one_error(served: LoopbackHub, what: str, tmp_path: Path) -> None:
    part, body = SHAPES[what]
    served.odd[part] = saying(body)
    for words in (["download", REPO], ["inspect", REPO], ["convert", "hf-to-orbax", REPO, str(tmp_path / "out")]):
        result = CliRunner().invoke(app, words)
        said = " ".join(result.stderr.split())
        assert result.exit_code == 3, result.output
        assert f"{served.endpoint} does not answer like the Hub: the " in said
        assert "expected" in said
        assert "check HF_ENDPOINT" in said
        assert "Traceback" not in said


def values(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values in nested JSON."""
    inside = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [at, *(place for key, value in inside for place in values(value, (*at, key)))]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["oid", "sha", "type"]), inner, max_size=2)
    ),
    max_leaves=3,
)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_right_answer_changed_anywhere_is_understood_or_refused(served: LoopbackHub, data: st.DataObject) -> None:
    part, right = data.draw(st.sampled_from([(INFO, {"id": REPO, "sha": COMMIT}), (TREE, listing())]))
    document: Any = [copy.deepcopy(right)]
    *above, key = (0, *data.draw(st.sampled_from(values(right))))
    inside = document
    for step in above:
        inside = inside[step]
    if data.draw(st.booleans()):
        inside[key] = data.draw(_JSON)
    else:
        del inside[key]
    served.odd = {part: saying(document[0] if document else None)}
    with contextlib.suppress(Dsv4Error):
        plan = plan_download(REPO)
        assert plan.revision == COMMIT
        assert {file.name for file in plan.files} <= set(FILES)


@pytest.mark.parametrize(
    "link",
    ["http://localhost:{port}/next", "http://127.0.0.1:1/next", "https://127.0.0.1:{port}/x", "//evil.example/next"],
)
def test_the_next_page_of_another_server_never_gets_the_token(
    served: LoopbackHub, monkeypatch: pytest.MonkeyPatch, link: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    port = served.endpoint.rpartition(":")[2]
    served.odd[TREE] = saying(listing(), Link=f'<{link.format(port=port)}>; rel="next"')
    with pytest.raises(BadInput, match="expected the next page on the same server, which gets the access token"):
        plan_download(REPO)
    assert served.requests
    assert not [request for request in served.requests if request.path == "/next"]


def test_a_listing_without_an_end_is_left(served: LoopbackHub) -> None:
    served.odd[TREE] = saying([], Link=f'<{served.endpoint}/api/models/{REPO}/tree/{COMMIT}>; rel="next"')
    with pytest.raises(BadInput, match="expected at most 100 pages"):
        plan_download(REPO)


@pytest.mark.parametrize("what", UNBOUNDED)
@pytest.mark.parametrize("part", ["config.json", INFO, TREE])
def test_bytes_and_time_are_bounded(
    served: LoopbackHub, monkeypatch: pytest.MonkeyPatch, what: str, part: str, tmp_path: Path
) -> None:
    """Downloading and opening; of the Hub's words and of a small file."""
    monkeypatch.setattr(remote, "WAITS", ())
    monkeypatch.setattr(remote, "GRACE_SECONDS", 1.0)
    monkeypatch.setattr(remote, "SLOWEST", 1 << 40)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    served.odd[part] = UNBOUNDED[what][0]
    for attempt in (
        lambda: download(REPO),
        lambda: open_source(REPO),
        lambda: download(REPO, local_dir=tmp_path / "x"),
    ):
        tracemalloc.start()
        begun = time.monotonic()
        try:
            with pytest.raises(Dsv4Error):
                attempt()
            assert tracemalloc.get_traced_memory()[1] < 64 << 20
        finally:
            tracemalloc.stop()
        assert time.monotonic() - begun < 10
        assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size > 1 << 20]


def test_a_stated_size_that_no_small_file_has_is_refused_before_it_is_fetched(served: LoopbackHub) -> None:
    served.odd[TREE] = saying(listing(lambda entries: entries[0].update(size=1 << 60)))
    with pytest.raises(BadInput, match=rf"config\.json: {1 << 60:,} bytes are stated"):
        open_source(REPO)
    assert "config.json" not in served.fetched()


def test_small_files_are_where_the_client_looks_for_them(served: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    download(REPO)
    served.requests.clear()
    for name in FILES:
        path = Path(hf_hub_download(REPO, name))
        assert path.read_bytes() == FILES[name]
        assert str(path) == try_to_load_from_cache(REPO, name)
        assert path.is_symlink()
    assert not [request for request in served.requests if request.method == "GET"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Path(hf_hub_download(REPO, "config.json")).read_bytes() == FILES["config.json"]  # by the branch's record
