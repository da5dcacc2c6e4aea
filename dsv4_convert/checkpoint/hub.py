"""Fetching a checkpoint from a Hugging Face Hub repository: only the files that are needed, at one pinned commit.

All requests go through huggingface_hub, so HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE, HF_HOME and HF_HUB_OFFLINE mean what
they mean everywhere; the client reads most of them once, when it is imported. A file is fetched whole or not at all:
the client resumes inside one run when a connection breaks, while a run that was ended starts its unfinished files
again and keeps the finished ones. It compares sizes only, so :func:`verify_download` compares content afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dsv4_convert.checkpoint.hub_plan import DownloadPlan, plan_download
from dsv4_convert.checkpoint.hub_progress import Meter, Progress
from dsv4_convert.checkpoint.planned import PlannedFile, check_room
from dsv4_convert.errors import BadInput, listed
from dsv4_convert.files.reading import WRONG_SUFFIX, set_aside
from dsv4_convert.files.workspace import locked

__all__ = [
    "DownloadPlan",
    "DownloadResult",
    "PlannedFile",
    "Progress",
    "download",
    "plan_download",
    "verify_download",
]

_TRANSFERS = 8
_HASHERS = 4


@dataclass(frozen=True, kw_only=True)
class DownloadResult:
    """A finished download.

    Attributes:
        path: the folder to open as a checkpoint.
        revision: the commit, 40 hex digits.
        files: names of the files that belong to it.
        unverified: those whose content was not compared with a hash: all of them without ``verify``, and those of
            which neither the Hub nor the cache states one.
    """

    path: Path
    revision: str
    files: tuple[str, ...]
    unverified: tuple[str, ...]


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    want: Callable[[str], bool] | None = None,
    cache_dir: Path | str | None = None,
    local_dir: Path | str | None = None,
    force: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> DownloadResult:
    """Fetch what :func:`plan_download` plans, then compare the content with the Hub's hashes.

    Files on disk are not fetched again unless ``force``; with ``verify`` they are read and hashed nevertheless.

    Raises:
        BadInput: as :func:`plan_download`, and content that is not what the Hub states.
        ResourceError: as :func:`plan_download`; too little disk space (before anything is fetched); a failing transfer;
            another process downloads to the same folder.
        UsageError: as :func:`plan_download`.

    Examples:
        >>> download("deepseek-ai/DeepSeek-V4-Flash").path  # doctest: +SKIP
    """
    plan = plan_download(repo_id, revision=revision, want=want, cache_dir=cache_dir, local_dir=local_dir, force=force)
    check_room(plan.folder, plan.to_download_bytes)
    if not plan.offline:
        with _held(None if local_dir is None else plan.folder):
            _fetch(plan, force=force, progress=progress)
    unverified = tuple(file.name for file in plan.files if file.oid is None or not verify)
    if verify:
        verify_download(plan, progress=progress)
    return DownloadResult(
        path=plan.folder,
        revision=plan.revision,
        files=tuple(file.name for file in plan.files),
        unverified=unverified,
    )


def verify_download(plan: DownloadPlan, *, progress: Progress | None = None) -> None:
    """Compare the size and the hash of every planned file on disk with what the Hub states.

    Deletes nothing, but renames what differs, so that neither a folder nor the Hub's cache holds it under its name.

    Reads all bytes, on up to four cores at about 1.3 GB/s each.

    Raises:
        BadInput: listing every file that is missing or differs, with both values.
    """
    meter = Meter("verify", sum(file.size for file in plan.files if file.oid is not None), progress)

    def problem_of(file: PlannedFile) -> str | None:
        path = plan.folder / file.name
        if not path.is_file():
            return f"{path}: missing"
        if (problem := file.problem(path, meter.add)) is not None:
            set_aside(path)
        return problem

    with ThreadPoolExecutor(min(_HASHERS, os.cpu_count() or 1)) as pool:
        try:
            problems = [problem for problem in pool.map(problem_of, plan.files) if problem is not None]
        except BaseException:
            meter.stop()
            raise
    if problems:
        raise BadInput(
            f"{plan.repo_id} at {plan.revision}: {len(problems)} of {len(plan.files)} files are not what the Hub "
            f"states; they are kept with {WRONG_SUFFIX} after their names, run the same command to download them "
            f"again:\n{listed(problems)}"
        )


@contextmanager
def _held(local_dir: Path | None) -> Iterator[None]:
    """Keep others from downloading to the same folder. Those that share the Hub's cache wait for each other there."""
    if local_dir is None:
        yield
        return
    file = local_dir / ".cache" / "huggingface" / "dsv4.lock"
    with locked(file, local_dir):
        yield


def _fetch(plan: DownloadPlan, *, force: bool, progress: Progress | None) -> None:
    """Fetch the files of the plan, eight at a time; the first failure stops the others at their next piece."""
    assert plan.target is not None
    meter = Meter("download", plan.to_download_bytes, progress)
    with ThreadPoolExecutor(_TRANSFERS) as pool:
        transfers = [pool.submit(plan.target.fetch, file, meter, force=force) for file in plan.files]
        try:
            for transfer in as_completed(transfers):
                transfer.result()
        except BaseException:
            meter.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    meter.finish()
