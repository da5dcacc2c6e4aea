"""A file appears whole or not at all, durably; an error says what failed and how to go on."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from dsv4_convert.errors import ResourceError
from dsv4_convert.files.writing import atomic_write, write_atomically, writing


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt()])
def test_until_the_end_the_former_file_is_there_and_nothing_stays(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"former")

    def fail() -> None:
        with atomic_write(path) as stream:
            stream.write(b"new")
            stream.flush()
            assert path.read_bytes() == b"former"
            raise error

    with pytest.raises(type(error)):
        fail()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"former"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_two_writers_at_once_do_not_mix(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "file") as first, atomic_write(tmp_path / "file") as second:
        first.write(b"first" * 10_000)
        second.write(b"second")
    assert (tmp_path / "file").read_bytes() == b"first" * 10_000


def test_permissions_are_those_of_the_former_file_or_the_usual_ones(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_atomically(tmp_path / "new", b"")
        (tmp_path / "former").touch()
        (tmp_path / "former").chmod(0o604)
        write_atomically(tmp_path / "former", b"x")
    finally:
        os.umask(mask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "former").stat().st_mode & 0o777 == 0o604


def test_what_is_on_the_disk_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def syncing(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.partition(".")[0] or "file")
        fsync(descriptor)

    def replacing(self: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "replace", replacing)
    write_atomically(tmp_path / "name", b"x")
    assert calls == ["file", "rename", tmp_path.name.partition(".")[0]]


def test_an_error_says_what_and_how_to_go_on(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, hard))
    try:
        with pytest.raises(ResourceError, match=r"file: cannot write: File too large.*run the same command again"):
            write_atomically(tmp_path / "file", bytes(1 << 12))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(ResourceError, match=r"x: cannot write: No space.*\(4,096 bytes are needed, [\d,]+ are free\)"),
        writing(tmp_path / "x", nbytes=4096),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
