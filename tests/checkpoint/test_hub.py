"""Downloading, with the real Hub client against a Hub on the loopback interface."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import httpx

from dsv4_convert.checkpoint import open_checkpoint
from dsv4_convert.checkpoint.hub import DownloadPlan, download, plan_download, verify_download
from dsv4_convert.checkpoint.hub_errors import hub_errors
from dsv4_convert.errors import BadInput, Dsv4Error, ResourceError, UsageError
from dsv4_convert.files.workspace import locked

from .hub_server import HubFile, LoopbackHub
from .safetensors_files import raw_file, u8_header

REPO = "org/tiny-model"
FIRST, SECOND = "1" * 40, "2" * 40
TOKEN = "hf_SecretSecretSecret"
SHARDS = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
TENSORS = {SHARDS[0]: ["embed"], SHARDS[1]: ["layers.0.w", "layers.0.v"], SHARDS[2]: ["layers.1.w"]}
SMALL = ["config.json", "model.safetensors.index.json", "tokenizer.json"]


def shard(names: list[str], fill: int) -> bytes:
    size = 100_000
    return raw_file(u8_header(dict.fromkeys(names, size)), bytes([fill]) * size * len(names))


def files_of(fill: int = 7) -> dict[str, bytes]:
    """A repository: a small checkpoint, and things that nobody asks for."""
    weight_map = {name: file for file, names in TENSORS.items() for name in names}
    return {
        "README.md": b"# tiny",
        "config.json": json.dumps({"fill": fill}).encode(),
        "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}).encode(),
        "tokenizer.json": b"{}",
        "inference/model.py": b"import os",
        **{name: shard(names, fill) for name, names in TENSORS.items()},
    }


def layer(number: int) -> Callable[[str], bool]:
    return lambda name: name.startswith(f"layers.{number}.")


def content_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


def expected_content(names: list[str], fill: int = 7) -> dict[str, bytes]:
    return {name: content for name, content in files_of(fill).items() if name in names}


@pytest.fixture
def served(hub: LoopbackHub) -> LoopbackHub:
    hub.add(REPO, FIRST, files_of())
    return hub


# --- what is fetched -------------------------------------------------------------------------------------------------


def test_whole_repository(served: LoopbackHub, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[str, int, int]] = []
    result = download(REPO, progress=lambda *step: seen.append(step))
    assert result.revision == FIRST
    assert result.path.name == FIRST
    assert sorted(result.files) == sorted(SMALL + SHARDS)
    assert not result.unverified
    assert content_of(result.path) == expected_content(SMALL + SHARDS)
    assert sorted(served.fetched()) == sorted(SMALL + SHARDS)  # each of them once, nothing else
    with open_checkpoint(result.path) as checkpoint:
        assert checkpoint.revision == FIRST
        assert len(checkpoint.tensors) == 4
    total = sum(len(content) for content in expected_content(SMALL + SHARDS).values())
    index = len(files_of()["model.safetensors.index.json"])
    assert [step for step in seen if step[0] == "download"][-1] == ("download", total - index, total - index)
    assert seen[-1] == ("verify", total, total)
    assert capfd.readouterr() == ("", "")


def test_only_the_shards_that_are_wanted(served: LoopbackHub) -> None:
    result = download(REPO, want=layer(0))
    assert sorted(content_of(result.path)) == sorted([*SMALL, SHARDS[1]])
    with open_checkpoint(result.path, partial=True) as checkpoint:
        assert set(checkpoint.tensors) == {"layers.0.w", "layers.0.v"}
        assert checkpoint.absent == {"embed", "layers.1.w"}
    served.requests.clear()
    download(REPO, want=lambda name: name != "embed")
    assert served.fetched() == [SHARDS[2]]
    with pytest.raises(UsageError, match="none of the 4 tensors is wanted"):
        download(REPO, want=layer(9))


def test_single_file_without_an_index(hub: LoopbackHub) -> None:
    hub.add(REPO, FIRST, {"config.json": b"{}", "model.safetensors": shard(["embed"], 1)})
    result = download(REPO, want=layer(0))
    assert list(open_checkpoint(result.path).tensors) == ["embed"]


def test_plan(served: LoopbackHub, tmp_path: Path) -> None:
    """A dry run: exact, and without a trace at the destination."""
    plan = plan_download(REPO, local_dir=tmp_path / "here")
    sizes = {name: len(content) for name, content in files_of().items()}
    assert plan.repo_id == REPO
    assert plan.revision == FIRST
    assert plan.folder == tmp_path / "here"
    assert {file.name: (file.size, file.cached) for file in plan.files} == {
        name: (sizes[name], False) for name in SMALL + SHARDS
    }
    assert plan.total_bytes == plan.to_download_bytes == sum(sizes[name] for name in SMALL + SHARDS)
    assert served.fetched() == ["model.safetensors.index.json"]
    assert not (tmp_path / "here").exists()
    download(REPO, want=layer(1))
    plan = plan_download(REPO)
    assert plan.to_download_bytes == sizes[SHARDS[0]] + sizes[SHARDS[1]]


def test_plan_knows_files_that_two_commits_share(served: LoopbackHub) -> None:
    """The branch moves because of the README: nothing is to be fetched again."""
    download(REPO)
    served.add(REPO, SECOND, files_of() | {"README.md": b"# new"})
    plan = plan_download(REPO)
    assert plan.revision == SECOND
    assert plan.to_download_bytes == 0
    served.requests.clear()
    result = download(REPO)
    assert result.revision == SECOND
    assert served.fetched() == []
    assert content_of(result.path) == expected_content(SMALL + SHARDS)


def test_revision_is_pinned(served: LoopbackHub) -> None:
    """The branch moves between resolving it and fetching: all files are of the commit that was resolved."""
    plan = plan_download(REPO)
    served.add(REPO, SECOND, files_of(fill=8))
    result = download(REPO, revision=plan.revision)
    assert result.revision == FIRST
    assert content_of(result.path) == expected_content(SMALL + SHARDS)
    assert {request.path.split("/resolve/")[1][:40] for request in served.requests if "/resolve/" in request.path} == {
        FIRST
    }
    assert download(REPO, revision="main").revision == SECOND
    served.branches[REPO]["v1"] = FIRST
    assert download(REPO, revision="v1").revision == FIRST


def test_local_dir(served: LoopbackHub, tmp_path: Path) -> None:
    here = tmp_path / "here"
    result = download(REPO, local_dir=here, want=layer(0))
    assert result.path == here
    assert content_of(here) == expected_content([*SMALL, SHARDS[1]])
    assert open_checkpoint(here, partial=True).revision == FIRST
    served.requests.clear()
    result = download(REPO, local_dir=here)
    assert sorted(served.fetched()) == [SHARDS[0], SHARDS[2]]
    assert content_of(here) == expected_content(SMALL + SHARDS)
    assert open_checkpoint(here).revision == FIRST
    served.add(REPO, SECOND, files_of(fill=8))
    assert download(REPO, local_dir=here).revision == SECOND
    assert content_of(here) == expected_content(SMALL + SHARDS, fill=8)
    assert open_checkpoint(here).revision == SECOND
    index = json.dumps({"weight_map": {"embed": SHARDS[0]}}).encode()
    served.add(REPO, "3" * 40, files_of(fill=8) | {"model.safetensors.index.json": index})
    assert [file.name for file in plan_download(REPO, local_dir=here).files] == [*SMALL, SHARDS[0]]


def test_files_in_the_cache_are_copied_to_a_folder(served: LoopbackHub, tmp_path: Path) -> None:
    download(REPO)
    served.requests.clear()
    seen: list[tuple[str, int, int]] = []
    result = download(REPO, local_dir=tmp_path / "here", progress=lambda *step: seen.append(step))
    assert content_of(result.path) == expected_content(SMALL + SHARDS)
    assert served.fetched() == []
    assert [done == total for stage, done, total in seen if stage == "download"][-1]


# --- interruptions ---------------------------------------------------------------------------------------------------


def test_resumes_after_a_cut(served: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # the client keeps whole pieces, of 10 MB
    served.cuts[SHARDS[1]] = 70_000
    result = download(REPO)
    assert f"{SHARDS[1]}+" in served.fetched()
    assert "bytes=70000-" in [request.range for request in served.requests]
    assert content_of(result.path) == expected_content(SMALL + SHARDS)


def test_the_client_s_warnings_hold_no_signature(
    served: LoopbackHub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    served.signature = "?X-Signature=SECRET"
    served.cuts[SHARDS[1]] = 70_000
    with caplog.at_level(logging.WARNING, "huggingface_hub"):
        download(REPO)
    assert f"{SHARDS[1]}?…" in caplog.text
    assert "SECRET" not in caplog.text


def test_a_second_run_fetches_what_the_first_could_not(served: LoopbackHub, tmp_path: Path) -> None:
    served.failures[f"/cdn/{REPO}/{FIRST}/{SHARDS[2]}"] = 500
    with pytest.raises(ResourceError, match=r"the Hub fails .HTTP 500.*again later"):
        download(REPO)
    del served.failures[f"/cdn/{REPO}/{FIRST}/{SHARDS[2]}"]
    missing = {file.name for file in plan_download(REPO).files if not file.cached}
    assert SHARDS[2] in missing
    served.requests.clear()
    result = download(REPO)
    assert set(served.fetched()) == missing
    assert content_of(result.path) == expected_content(SMALL + SHARDS)


def test_interrupt_stops_the_other_transfers(served: LoopbackHub) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(REPO, progress=interrupt)
    assert plan_download(REPO).to_download_bytes > 0
    assert content_of(download(REPO).path) == expected_content(SMALL + SHARDS)


def test_offline_from_the_cache(served: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    download(REPO, want=layer(0))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    served.requests.clear()
    result = download(REPO, want=layer(0))
    assert result.revision == FIRST
    assert not result.unverified
    assert not served.requests
    assert content_of(result.path) == expected_content([*SMALL, SHARDS[1]])
    with pytest.raises(ResourceError, match=f"cannot be reached.* incomplete: 2 of 3 shards(.|\n)*{SHARDS[0]}"):
        download(REPO)
    with pytest.raises(UsageError, match="--force"):
        download(REPO, want=layer(0), force=True)
    with pytest.raises(ResourceError, match=r"other.*unset HF_HUB_OFFLINE"):
        download("org/other")
    with pytest.raises(ResourceError, match="unset HF_HUB_OFFLINE"):
        download(REPO, revision=SECOND)
    (result.path / SHARDS[1]).resolve().write_bytes(b"x" * len(files_of()[SHARDS[1]]))
    with pytest.raises(BadInput, match="expected sha256"):
        download(REPO, want=layer(0))


def test_offline_from_a_folder(served: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    download(REPO, local_dir=tmp_path / "here")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert content_of(download(REPO, local_dir=tmp_path / "here").path) == expected_content(SMALL + SHARDS)


def test_unreachable_hub_falls_back_on_the_cache(
    served: LoopbackHub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ResourceError, match=r"cannot be reached .*Connection refused"):
        download(REPO)
    monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
    download(REPO)
    served.failures["/api/"] = 503
    with caplog.at_level(logging.WARNING, "dsv4_convert"):
        assert download(REPO).revision == FIRST
    assert "the Hub cannot be asked" in caplog.text
    with pytest.raises(ResourceError, match="HTTP 503"):
        download("org/other")


# --- refusals --------------------------------------------------------------------------------------------------------


class Refusal(NamedTuple):
    arrange: Callable[[LoopbackHub], object]
    ask: dict[str, Any]
    kind: type[Dsv4Error]
    expected: str


def without(name: str) -> Callable[[LoopbackHub], object]:
    return lambda hub: hub.commits[REPO][FIRST].pop(name)


def set_index(text: bytes) -> Callable[[LoopbackHub], object]:
    return lambda hub: hub.add(REPO, FIRST, files_of() | {"model.safetensors.index.json": text})


REFUSALS = {
    "no such repository": Refusal(lambda hub: hub.commits.clear(), {}, BadInput, "no such repository, or a private"),
    "no such branch": Refusal(lambda hub: None, {"revision": "v9"}, BadInput, "no revision 'v9'"),
    "no such commit": Refusal(lambda hub: None, {"revision": SECOND}, BadInput, f"no revision '{SECOND}'"),
    "private": Refusal(lambda hub: vars(hub).update(required_token="hf_other"), {}, BadInput, "private one.*HF_TOKEN"),
    "gated": Refusal(
        lambda hub: vars(hub).update(required_token="hf_other", gated=True),
        {},
        BadInput,
        "access is gated; accept its terms at http.*/org/tiny-model, then set HF_TOKEN",
    ),
    "bad token": Refusal(lambda hub: hub.failures.update({"/api/": 401}), {}, BadInput, "HTTP 401.*HF_TOKEN"),
    "forbidden": Refusal(lambda hub: hub.failures.update({"/api/": 403}), {}, BadInput, "HTTP 403.*HF_TOKEN"),
    "odd status": Refusal(lambda hub: hub.failures.update({"/api/": 418}), {}, BadInput, "HTTP 418"),
    "too many": Refusal(lambda hub: hub.failures.update({"/api/": 429}), {}, ResourceError, "slow down"),
    "hub down": Refusal(lambda hub: hub.failures.update({"/api/": 500}), {}, ResourceError, "HTTP 500"),
    "shard forbidden": Refusal(lambda hub: hub.failures.update({SHARDS[0]: 403}), {}, BadInput, "HTTP 403"),
    "shard gone": Refusal(lambda hub: hub.failures.update({f"/cdn/{REPO}": 404}), {}, BadInput, "HTTP 404"),
    "not a repository": Refusal(lambda hub: None, {"repo_id": "./some/folder"}, UsageError, "not a repository name"),
    "no config": Refusal(without("config.json"), {}, BadInput, "no config.json"),
    "no index": Refusal(without("model.safetensors.index.json"), {}, BadInput, "found 3 such files and no index"),
    "shard missing": Refusal(without(SHARDS[2]), {}, BadInput, f"1 of 3 shards(.|\n)*{SHARDS[2]}"),
    "index is a web page": Refusal(set_index(b"<html></html>"), {}, BadInput, "a web page"),
    "index leads outside": Refusal(
        set_index(json.dumps({"weight_map": {"a": "../../x.safetensors"}}).encode()), {}, BadInput, "plain file name"
    ),
    "token with a space": Refusal(lambda hub: None, {"token": f"{TOKEN} {TOKEN}"}, UsageError, "cannot be sent"),
    "token with an accent": Refusal(lambda hub: None, {"token": f"{TOKEN}é"}, UsageError, "cannot be sent"),
    "commit that is none": Refusal(
        lambda hub: hub.add(REPO, "../../etc", files_of()),
        {},
        BadInput,
        r"expected the hash of a commit.*'\.\./\.\./etc'",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(
    served: LoopbackHub,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    refusal = REFUSALS[case]
    refusal.arrange(served)
    asked = {"repo_id": REPO, "token": TOKEN} | refusal.ask
    monkeypatch.setenv("HF_TOKEN", asked.pop("token"))
    with caplog.at_level(logging.DEBUG), pytest.raises(refusal.kind, match=refusal.expected) as caught:
        download(**asked)
    message = str(caught.value)
    assert refusal.ask.get("repo_id", REPO) in message.replace("--", "/") or "token" in case
    chain: list[str] = []
    error: BaseException | None = caught.value
    while error is not None:
        chain.append(str(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    out, err = capfd.readouterr()
    assert TOKEN not in " ".join([*chain, caplog.text, out, err])


def test_hash_that_is_none(served: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would become part of a path."""
    monkeypatch.setattr(HubFile, "git_oid", "../../x")
    with pytest.raises(BadInput, match=r"the listing of org/tiny-model: expected .*'\.\./\.\./x'"):
        download(REPO)


@pytest.mark.parametrize(
    ("error", "kind", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left"), ResourceError, "No space left; make room"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache/x"), ResourceError, "/cache/x: Permission denied"),
        (OSError(errno.EDQUOT, "Quota", "/cache/x", None, "/folder/x"), ResourceError, "/folder/x: Quota; make room"),
        (OSError("Consistency check failed"), ResourceError, "the transfer failed .OSError"),
        (LocalEntryNotFoundError("gone"), ResourceError, "the transfer failed .LocalEntryNotFoundError"),
        (httpx.ReadTimeout("slow"), ResourceError, "cannot be reached .ReadTimeout"),
        (httpx.LocalProtocolError(f"Illegal header value b'Bearer {TOKEN}'"), UsageError, "cannot be sent"),
    ],
)
def test_errors_of_the_client(error: Exception, kind: type[Dsv4Error], expected: str) -> None:
    for raised in (error, ValueError("a forced download failed")):
        if raised is not error:
            raised.__cause__ = error
        with pytest.raises(kind, match=expected) as caught, hub_errors(REPO, "main"):
            raise raised
        if TOKEN in str(error):
            assert caught.value.__suppress_context__
            assert caught.value.__cause__ is None


def test_bugs_are_not_dressed_up() -> None:
    with pytest.raises(ValueError, match="a bug"), hub_errors(REPO, "main"):
        raise ValueError("a bug")


def test_token_is_used(served: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    served.required_token = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert download(REPO).revision == FIRST
    # The Hub gets the token, the other host that large files come from does not.
    assert {(request.path.startswith("/cdn/"), request.token) for request in served.requests} == {
        (False, TOKEN),
        (True, None),
    }


def test_disk_space_is_checked_first(served: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=300_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    needed = plan_download(REPO, local_dir=tmp_path / "a" / "b").to_download_bytes
    served.requests.clear()
    with pytest.raises(ResourceError, match=f"{needed:,} bytes are still to be downloaded, 300,000 are free"):
        download(REPO, local_dir=tmp_path / "a" / "b")
    assert served.fetched() == []
    download(REPO, want=layer(1))
    with pytest.raises(ResourceError, match="are still to be downloaded"):
        download(REPO, want=lambda name: name != "embed", force=True)


# --- content ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SHARDS[1], "tokenizer.json"])
def test_right_size_and_wrong_content(served: LoopbackHub, name: str) -> None:
    """The client itself is content with the size; this is what the check afterwards is for."""
    file = served.commits[REPO][FIRST][name]
    file.sent = bytes(reversed(file.content))
    assert snapshot_download(REPO)
    with pytest.raises(BadInput) as caught:
        download(REPO)
    algorithm = "sha256" if name in SHARDS else "sha1"
    assert f"/{name}: expected {algorithm} {file.etag}, found " in str(caught.value)
    assert "1 of 6 files" in str(caught.value)
    plan = plan_download(REPO)
    assert name not in content_of(plan.folder)  # so that the folder does not pass for a checkpoint
    blobs = content_of(plan.folder.parents[1] / "blobs")
    assert blobs[f"{file.etag}.wrong"] == file.sent  # nothing was deleted
    assert [planned.name for planned in plan.files if not planned.cached] == [name]
    assert download(REPO, verify=False).unverified == tuple(planned.name for planned in plan.files)
    with pytest.raises(BadInput, match="run the same command"):
        download(REPO)
    file.sent = None
    assert content_of(download(REPO).path)[name] == file.content
    verify_download(plan)


def test_a_damaged_index_in_the_cache(served: LoopbackHub) -> None:
    """The way out that every message names works for the index too, although planning needs it."""
    plan = plan_download(REPO)
    (plan.folder / "model.safetensors.index.json").resolve().write_bytes(b"<html>")
    with pytest.raises(BadInput, match="a web page"):
        download(REPO)
    assert plan_download(REPO, force=True).to_download_bytes == plan.total_bytes
    assert content_of(download(REPO, force=True).path) == expected_content(SMALL + SHARDS)


def test_all_wrong_files_are_listed(served: LoopbackHub) -> None:
    plan = plan_download(REPO)
    download(REPO)
    (plan.folder / SHARDS[0]).unlink()
    (plan.folder / SHARDS[1]).resolve().write_bytes(b"short")
    with pytest.raises(BadInput, match=rf"2 of 6(.|\n)*{SHARDS[0]}: missing(.|\n)*{SHARDS[1]}: expected .*, found 5"):
        verify_download(plan)


def test_unknown_hash_is_reported(served: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, with a cache that holds files instead of links, the Hub's hash is not known: said, not hidden."""
    path = download(REPO, want=layer(0)).path
    target = (path / SHARDS[1]).resolve()
    (path / SHARDS[1]).unlink()
    target.rename(path / SHARDS[1])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download(REPO, want=layer(0)).unverified == (SHARDS[1],)


# --- a process of its own --------------------------------------------------------------------------------------------


def test_environment_is_honoured(served: LoopbackHub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE and HF_HUB_OFFLINE, and the token appears nowhere."""
    script = """
import json, sys
from dsv4_convert.checkpoint.hub import download
result = download(sys.argv[1])
print(json.dumps([str(result.path), result.revision, len(result.files)]))
"""
    served.required_token = TOKEN
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": served.endpoint,
        "HF_HUB_CACHE": str(tmp_path / "elsewhere"),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    }

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script, REPO],
            capture_output=True,
            text=True,
            check=False,
            env=environment | more,
            cwd=Path(__file__).parents[2],  # where a process of its own finds the packages
        )

    done = run(HF_TOKEN=TOKEN, HF_DEBUG="1")
    assert done.returncode == 0, done.stderr
    path, revision, count = json.loads(done.stdout)
    assert path.startswith(str(tmp_path / "elsewhere"))
    assert revision == FIRST
    assert count == len(SMALL + SHARDS)
    assert TOKEN not in done.stdout + done.stderr
    wrong = run(HF_TOKEN=f"{TOKEN}wrong")
    assert wrong.returncode == 1
    assert "BadInput" in wrong.stderr
    assert TOKEN not in wrong.stdout + wrong.stderr
    served.requests.clear()
    offline = run(HF_HUB_OFFLINE="1")
    assert json.loads(offline.stdout)[1] == FIRST
    assert not served.requests


def test_plan_is_a_value() -> None:
    """The totals that the command line prints need nothing on disk."""
    plan = DownloadPlan(repo_id=REPO, revision=FIRST, folder=Path("x"), files=(), offline=False)
    assert plan.total_bytes == plan.to_download_bytes == 0


def test_a_folder_in_the_home_is_held_where_it_is(
    served: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    result = download(REPO, local_dir="~/here", want=layer(0))
    assert result.path == tmp_path / "here"
    lock = tmp_path / "here" / ".cache" / "huggingface" / "dsv4.lock"
    with locked(lock, lock), pytest.raises(ResourceError, match="here: another process"):
        download(REPO, local_dir="~/here", want=layer(0))
    assert not list((tmp_path / "elsewhere").iterdir())
