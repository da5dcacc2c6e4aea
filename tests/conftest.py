"""Settings of every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from .checkpoint.hub_server import LoopbackHub

# No deadline: the first example of a test may compile a program. Derandomised, so that CI says the same every time.
settings.register_profile("dsv4", deadline=None, derandomize=True)
settings.load_profile("dsv4")

# transformers must neither look for a hub nor draw progress bars into the test output.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# The threads of BLAS and OpenMP wait for one another by spinning: with tests side by side, and on arrays as small as
# these, that takes several times what the work does.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A loopback Hub that the Hub client of this process talks to, with an empty cache and no token.

    The client reads its environment once, on import, so its constants are replaced and not the environment.
    """
    from huggingface_hub import close_session, constants

    server = LoopbackHub()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_URL_HOSTS", frozenset({"127.0.0.1"}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    # A list that the client fetches once a day, by whichever request comes first.
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses.json"))
    (tmp_path / "harnesses.json").write_text('{"standardEnvVars": [], "harnesses": {}}', encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its retries
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    close_session()
    yield server
    close_session()
    server.close()


@pytest.fixture
def bucket() -> Iterator[dict[str, object]]:
    """``gs://`` URLs lead to an empty file system in memory; its files by path."""
    import fsspec

    from .memory_bucket import MemoryBucket

    for name in MemoryBucket.protocol:
        fsspec.register_implementation(name, MemoryBucket, clobber=True)
    MemoryBucket.store.clear()
    yield MemoryBucket.store
    MemoryBucket.store.clear()
