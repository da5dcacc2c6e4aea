"""The Hub commit of a downloaded file, from the record that the Hub client keeps beside it.

In its cache the client keeps ``<cache>/models--ORG--NAME/snapshots/<commit>/FILE``, a link to ``../../blobs/<oid>``.
For a download to a folder of the user's choice it writes ``.cache/huggingface/download/FILE.metadata``, three lines:
commit, oid and the time of the download. The oid is the LFS sha256 (64 hex digits) or the git blob hash (40).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_COMMIT = re.compile(r"[0-9a-f]{40}")
_OID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The Hub client's record of one downloaded file."""

    commit: str
    oid: str


def is_commit(text: str) -> bool:
    """Whether a revision is a full commit hash, which can never come to mean something else."""
    return _COMMIT.fullmatch(text) is not None


def is_oid(text: str) -> bool:
    """Whether a text is a sha256 or a git blob hash."""
    return _OID.fullmatch(text) is not None


def snapshot_commit(folder: Path) -> str | None:
    """The commit of a snapshot folder of the Hub cache; None for any other folder."""
    real = folder.resolve()
    return real.name if real.parent.name == "snapshots" and is_commit(real.name) else None


def cached_oid(file: Path) -> str | None:
    """The oid of a file of a snapshot folder, from the blob that it links to; None where it is not a link."""
    if not file.is_symlink():
        return None
    oid = Path(os.readlink(file)).name
    return oid if is_oid(oid) else None


def recorded(folder: Path, name: str) -> Recorded | None:
    """The record beside a file that was downloaded to ``folder``; None without one, or if the file is newer than it."""
    try:
        text = (folder / ".cache" / "huggingface" / "download" / f"{name}.metadata").read_text(encoding="utf-8")
        commit, oid, timestamp = text.split()
        # The client itself allows a second between the last write and the record.
        if not is_commit(commit) or not is_oid(oid) or (folder / name).stat().st_mtime - 1 > float(timestamp):
            return None
    except (OSError, ValueError):
        return None
    return Recorded(commit=commit, oid=oid)
