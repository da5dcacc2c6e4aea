"""The folder in which a destination grows: one writer at a time, and nothing that another kind wrote is deleted."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from dsv4_convert.errors import ResourceError, UsageError
from dsv4_convert.store.staging import staging_area
from dsv4_convert.unfinished import destination_of, folder_of, held

_OWN = re.compile("mine")


def _other(destination: Path) -> AbstractContextManager[None]:
    """As recordings and random checkpoints hold it."""
    return held(folder_of(destination), _OWN)


def test_every_kind_of_writer_keeps_the_others_out(tmp_path: Path) -> None:
    destination = tmp_path / "dest"
    for first in (staging_area, _other):
        for second in (staging_area, _other):
            taken: Any = second(destination)
            with first(destination), pytest.raises(ResourceError, match=r"dest: another process.* is writing"), taken:
                pass


@pytest.mark.parametrize("name", ["theirs", ".theirs.tmp", "lock", "mine.tmp"])
def test_what_another_kind_wrote_stays(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path / "dest")
    folder.mkdir()
    for own in ("mine", ".mine.tmp"):
        (folder / own).touch()
    with held(folder, _OWN):
        pass
    (folder / name).write_text("work")
    refused = pytest.raises(UsageError, match=rf"(?s)is here.*{re.escape(name)}.*another destination")
    with refused, _other(tmp_path / "dest"):
        pass
    assert (folder / name).read_text() == "work"


def test_a_conversion_takes_a_file_system_that_locks_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS makes flock a lock of bytes, which it refuses of a folder."""
    flock = fcntl.flock

    def of_files(descriptor: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", of_files)
    with staging_area(tmp_path / "dest"), pytest.raises(ResourceError, match=r"another process \(pid"):  # noqa: SIM117
        with staging_area(tmp_path / "dest"):
            pass
    with pytest.raises(ResourceError, match="cannot be locked"), _other(tmp_path / "dest"):
        pass


def test_a_lock_that_leads_to_nothing_is_no_reason_to_wait(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "dest")
    folder.mkdir()
    (folder / "lock").symlink_to("nowhere/at/all")
    with pytest.raises(ResourceError, match=r"lock: cannot write"), staging_area(tmp_path / "dest"):
        pass


def test_a_folder_without_a_name_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert folder_of(Path()) == folder_of(tmp_path)
    assert destination_of(folder_of(Path("x/.."))) == tmp_path
    assert destination_of(folder_of(Path("/"))) == Path("/")
