"""Recognises the kind of a path by a file that only this kind has; the module of the kind does the rest."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from dsv4_convert.checkpoint.index import CONFIG_NAME, INDEX_NAME, SHARD_SUFFIX
from dsv4_convert.checkpoint.locate import open_source
from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.files.workspace import stage_of
from dsv4_convert.folders import ORBAX_FILES, PathLike
from dsv4_convert.golden.archive import open_golden
from dsv4_convert.golden.manifest import MANIFEST_NAME
from dsv4_convert.golden.writer import REQUEST_NAME
from dsv4_convert.inspection.converted import inspect_conversion, inspect_converted, inspect_export
from dsv4_convert.inspection.published import inspect_folder, inspect_opened
from dsv4_convert.inspection.recorded import inspect_golden, inspect_recording
from dsv4_convert.inspection.report import Inspection, What
from dsv4_convert.show.urls import without_secrets
from dsv4_convert.spec.config import Config
from dsv4_convert.store import as_path, open_store
from dsv4_convert.store.export_state import EXPORT_STATE
from dsv4_convert.store.layout import MANIFEST_FILE

#: Called with a message about the current step.
Say = Callable[[str], None]

_LOOKED_FOR = (
    f"{MANIFEST_FILE} (a conversion), journal.jsonl, {EXPORT_STATE} or {REQUEST_NAME} (unfinished ones), "
    f"{MANIFEST_NAME} (a golden), {CONFIG_NAME} (a checkpoint)"
)


def inspect(place: PathLike, *, revision: str | None = None, say: Say = lambda _: None) -> Inspection:
    """Find out what lies at ``place``; no weight is read; for a Hub repository, only the shard headers are fetched.

    Args:
        place: a folder, a ``config.json``, ``owner/name`` of a Hub repository, or a URL: ``gs://`` of anything,
            ``https://`` and others of a golden.
        revision: of a repository.
        say: called with what is being done.

    Raises:
        BadInput: nothing that dsv4 knows lies there; the message says what was looked for.
        ResourceError: the Hub or the bucket cannot be reached.
        UsageError: a revision of something that is no repository.

    Examples:
        >>> str(inspect("orbax").what)
        'Orbax checkpoint of dsv4'
    """
    place = os.fspath(place)
    path = Path(place)
    remote = "://" in place
    if revision is not None and (remote or path.exists()):
        raise UsageError(f"{place}: not a repository, so --revision {revision} means nothing; leave it out")
    if remote:
        return _behind_url(place, say)
    if path.is_file():
        return _file(path)
    if path.is_dir():
        return _folder(path, say)
    if (partial := stage_of(path)).is_dir():
        return _folder(partial, say)
    say("reading headers")
    with open_source(place, revision=revision) as checkpoint:
        return inspect_opened(
            checkpoint, What.REPOSITORY, place=place, known_by="the Hub has a repository of this name"
        )


def _behind_url(url: str, say: Say) -> Inspection:
    say("looking")
    shown = without_secrets(url)
    if not url.startswith("gs://"):
        return inspect_golden(open_golden(url), place=shown, known_by=f"{MANIFEST_NAME} behind the URL", say=say)
    folder = as_path(url)
    if (folder / MANIFEST_FILE).exists():
        return inspect_converted(open_store(url), place=shown, known_by=MANIFEST_FILE, say=say)
    if (folder / MANIFEST_NAME).exists():
        return inspect_golden(open_golden(url), place=shown, known_by=MANIFEST_NAME, say=say)
    with open_source(url) as checkpoint:
        return inspect_opened(checkpoint, What.CHECKPOINT, place=shown, known_by=CONFIG_NAME)


def _file(path: Path) -> Inspection:
    if path.suffix != ".json":
        raise BadInput(f"{path}: a file, but not a {CONFIG_NAME}; give it, or the folder that this file lies in")
    return _config(path, place=str(path), known_by="its fields")


def _config(path: Path, *, place: str, known_by: str) -> Inspection:
    config = Config.from_file(path)
    return Inspection(what=What.CONFIG, place=place, known_by=known_by, facts={}, config=config)


def _folder(path: Path, say: Say) -> Inspection:
    place = str(path)
    there = {entry.name for entry in path.iterdir()}
    if MANIFEST_FILE in there:
        return inspect_converted(open_store(path), place=place, known_by=MANIFEST_FILE, say=say)
    if journals := sorted(name for name in there if name.startswith("journal") and name.endswith(".jsonl")):
        return inspect_conversion(path, place=place, known_by=journals[0])
    if EXPORT_STATE in there:
        return inspect_export(path, place=place, known_by=EXPORT_STATE)
    if REQUEST_NAME in there:
        return inspect_recording(path, place=place, known_by=REQUEST_NAME)
    if MANIFEST_NAME in there:
        return inspect_golden(open_golden(path), place=place, known_by=MANIFEST_NAME, say=say)
    if CONFIG_NAME in there:
        if INDEX_NAME in there or any(name.endswith(SHARD_SUFFIX) for name in there):
            say("reading headers")
            return inspect_folder(path, place=place, known_by=f"{CONFIG_NAME} and {SHARD_SUFFIX} files or their index")
        return _config(path / CONFIG_NAME, place=place, known_by=f"{CONFIG_NAME}, and no {SHARD_SUFFIX} file beside it")
    if "snapshots" in there:
        raise BadInput(f"{path}: a repository in the Hub cache; give one of the folders in {path / 'snapshots'}")
    if found := sorted(there.intersection(ORBAX_FILES)):
        raise BadInput(
            f"{path}: an Orbax checkpoint ({', '.join(found)}), but not one that dsv4 wrote, or one whose "
            f"{MANIFEST_FILE} is gone; convert the model with `dsv4 convert hf-to-orbax`"
        )
    raise BadInput(f"{path}: none of the things that dsv4 knows. Looked for, and not found: {_LOOKED_FOR}")
