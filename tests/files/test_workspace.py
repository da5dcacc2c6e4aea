"""The stage in which a destination grows: one writer at a time, and nothing that another kind wrote is deleted."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from pathlib import Path

import pytest

from dsv4_convert.errors import ResourceError, UsageError
from dsv4_convert.files import workspace as module
from dsv4_convert.files.workspace import Workspace, destination_of, refuse_other_settings, scratch_folder, stage_of
from dsv4_convert.store.folder import Folder

_OWN = re.compile("mine|content|replaced")


def _conversion(destination: Path) -> Workspace:
    """As conversions and exports hold it."""
    return Folder(destination).workspace


def _other(destination: Path) -> Workspace:
    """As recordings and random checkpoints hold it."""
    return Workspace(destination, _OWN)


def test_every_kind_of_writer_keeps_the_others_out(tmp_path: Path) -> None:
    destination = tmp_path / "dest"
    for first in (_conversion, _other):
        for second in (_conversion, _other):
            taken = second(destination)
            refused = pytest.raises(ResourceError, match=rf"dest: another process \(pid {os.getpid()}\) is writing")
            with first(destination), refused, taken:
                pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["theirs", ".theirs.0123abcd.tmp", ".theirs.tmp", "lock", "mine.tmp"])
def test_what_another_kind_wrote_stays(tmp_path: Path, name: str) -> None:
    folder = stage_of(tmp_path / "dest")
    folder.mkdir()
    for own in ("mine", ".mine.0123abcd.tmp", ".mine.tmp"):
        (folder / own).touch()
    with _other(tmp_path / "dest"):
        assert [entry.name for entry in folder.iterdir()] == ["mine"], "what a kill left half written is removed"
    (folder / name).write_text("work")
    refused = pytest.raises(UsageError, match=rf"(?s)holds files.*{re.escape(name)}.*another destination")
    with refused, _other(tmp_path / "dest"):
        pass
    assert (folder / name).read_text() == "work"


def test_a_file_system_that_locks_files_alone_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS makes flock a lock of bytes, which it refuses of a folder."""
    flock = fcntl.flock

    def of_files(descriptor: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", of_files)
    refused = pytest.raises(ResourceError, match=r"another process \(pid")
    with _other(tmp_path / "dest"), refused, _other(tmp_path / "dest"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_will_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(ResourceError, match=r"cannot write and lock it.*a file system that has locks"),
        _other(tmp_path),
    ):
        pass


def test_a_lock_that_its_holder_removed_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other writer finishes between our opening of the lock file and our locking it."""
    flock, lock = fcntl.flock, tmp_path / "dest.dsv4-lock"
    seen: list[int] = []

    def removed_first(descriptor: int, operation: int) -> None:
        seen.append(descriptor)
        if len(seen) == 1:
            lock.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with _other(tmp_path / "dest"):
        assert len(seen) == 2
        assert lock.exists()
        with pytest.raises(ResourceError), _other(tmp_path / "dest"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_leads_to_nothing_is_no_reason_to_wait(tmp_path: Path) -> None:
    (tmp_path / "dest.dsv4-lock").symlink_to("nowhere/at/all")
    with pytest.raises(ResourceError, match=r"dest.dsv4-lock: cannot write"), _other(tmp_path / "dest"):
        pass


def test_a_folder_without_a_name_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert stage_of(Path()) == stage_of(tmp_path)
    assert destination_of(stage_of(Path("x/.."))) == tmp_path
    assert destination_of(stage_of(Path("/"))) == Path("/")


@pytest.mark.parametrize("killed_at", ["rename of the former", "rename of the new", "removal", None])
def test_a_kill_within_publishing_leaves_the_former_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str | None
) -> None:
    """The next run finds the stage as it was, with the former destination in its place, or no stage any more."""
    destination = tmp_path / "dest"
    destination.mkdir()
    (destination / "former").touch()
    steps = iter(["rename of the former", "rename of the new"])
    rename, remove = Path.rename, module.shutil.rmtree

    def renaming(self: Path, target: Path) -> Path:
        if next(steps) == killed_at:
            raise KeyboardInterrupt
        return rename(self, target)

    def removing(folder: Path) -> None:
        if killed_at == "removal":
            raise KeyboardInterrupt
        remove(folder)

    def run() -> None:
        with Workspace(destination, _OWN, content="content") as workspace:
            workspace.content.mkdir()
            (workspace.content / "new").touch()
            (workspace.stage / "mine").touch()
            with monkeypatch.context() as patched:
                patched.setattr(Path, "rename", renaming)
                patched.setattr(module.shutil, "rmtree", removing)
                workspace.publish()

    if killed_at is None:
        run()
    else:
        with pytest.raises(KeyboardInterrupt):
            run()
    with Workspace(destination, _OWN, content="content") as workspace:
        left = sorted(entry.name for entry in workspace.stage.iterdir())
    published = killed_at in ("removal", None)
    assert left == ([] if published else ["content", "mine"])
    assert [entry.name for entry in destination.iterdir()] == ["new" if published else "former"]


def test_settings_that_differ_are_named_with_the_ways_out(tmp_path: Path) -> None:
    then = {"same": 1, "source": "a" * 10_000, "gone": None, "layers": [1]}
    now = {"same": 1, "source": "b", "layers": [1, 2]}
    refuse_other_settings(tmp_path, "recording", then=then, now=then)
    with pytest.raises(UsageError) as refused:
        refuse_other_settings(tmp_path, "recording", then=then, now=now)
    said = str(refused.value)
    assert "an unfinished recording with other settings" in said
    assert "layers: [1] then, [1, 2] now" in said
    assert "former settings" in said
    assert "--restart" in said
    assert len(said) < 1500
    assert "same" not in said


def test_scratch_that_killed_processes_left_is_removed_and_that_of_others_stays(tmp_path: Path) -> None:
    left = tmp_path / ".dsv4-probe-00000000"
    left.mkdir()
    (left / "chunk").touch()
    left.with_suffix(".lock").touch()
    (tmp_path / ".dsv4-probe-11111111.lock").touch()
    with scratch_folder(tmp_path) as first:
        assert {entry.name for entry in tmp_path.iterdir()} == {first.name, f"{first.name}.lock"}
        with scratch_folder(tmp_path) as second:
            assert first.is_dir()
            assert second.is_dir()
            assert first != second
    assert list(tmp_path.iterdir()) == []
