"""Reading files as they come: the kind of a path, and one wording for it everywhere."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsv4_convert.errors import BadInput

_CHUNK_BYTES = 8 << 20

#: Suffix for the name of a file with wrong content.
WRONG_SUFFIX = ".wrong"

#: (first bytes, what that file is and what to do about it); the first match wins.
_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, not the file itself; run `git lfs pull` there, or download the file with `dsv4 download`",
    ),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"PK\x03\x04", "a ZIP archive, which is also how torch.save writes; only safetensors files are read"),
    (b"\x80\x02", "a Python pickle; only safetensors files are read, because unpickling runs foreign code"),
    (b"\x80\x04", "a Python pickle; only safetensors files are read, because unpickling runs foreign code"),
    (b"GGUF", "a GGUF file; only safetensors files are read"),
)
_WEB_PAGE = (b"<!doctype", b"<html", b"<?xml")


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """The identity of one state of a file: size in bytes, modification time in ns, device and inode."""

    size: int
    mtime_ns: int
    device: int
    inode: int


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp in a stat result."""
    return Stamp(size=status.st_size, mtime_ns=status.st_mtime_ns, device=status.st_dev, inode=status.st_ino)


def stat_regular(path: Path) -> os.stat_result:
    """Status of a regular file, links followed. Nothing is opened, so a FIFO cannot block.

    Raises:
        BadInput: the path is missing, a link to nothing or to itself, a folder, a FIFO, a device or unreachable.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            target = os.readlink(path)
            raise BadInput(f"{path}: a link to {target}, which does not exist; download that file again") from None
        raise BadInput(f"{path}: no such file") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BadInput(f"{path}: a link that leads back to itself; replace it by the file") from None
        raise BadInput(f"{path}: cannot be reached ({error.strerror}); check the path and its permissions") from None
    kind = status.st_mode
    if stat.S_ISDIR(kind):
        raise BadInput(f"{path}: a folder, where a file is expected")
    if not stat.S_ISREG(kind):
        found = "a named pipe" if stat.S_ISFIFO(kind) else "a device or socket"
        raise BadInput(f"{path}: {found}, where a regular file is expected; save its content to a file first")
    return status


def read_start(path: Path, length: int) -> bytes:
    """The first ``length`` bytes of a regular file, fewer if it is shorter.

    Raises:
        BadInput: the file cannot be opened or read.
    """
    try:
        with path.open("rb") as stream:
            return stream.read(length)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def foreign_content(head: bytes) -> str | None:
    """Guess the kind of a file that is not safetensors, with the way out; None if its first bytes say nothing."""
    for magic, description in _FOREIGN:
        if head.startswith(magic):
            return description
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(_WEB_PAGE):
        return "a web page, probably the error page of a download; download the file again"
    if text.startswith((b"{", b"[")):
        return "JSON text, probably the error answer of a server; download the file again"
    if head and not head.strip(b"\0"):
        return "full of zeros at its start, as a download leaves it that never finished; download the file again"
    return None


def set_aside(path: Path) -> Path:
    """Rename a file with wrong content, and its link target, so that nothing takes it for the right one.

    Nothing is deleted but the link. Returns the new name.
    """
    real = path.resolve()
    aside = real.with_name(f"{real.name}{WRONG_SUFFIX}")
    real.replace(aside)
    if path.is_symlink():
        path.unlink()
    return aside


def file_digest(
    path: Path, algorithm: str = "sha256", *, prefix: bytes = b"", on_bytes: Callable[[int], None] | None = None
) -> str:
    """Hex digest of ``prefix`` and the file's content, read in pieces of 8 MiB.

    ``on_bytes`` is told the length of each piece. hashlib lets other threads run meanwhile.

    Raises:
        BadInput: the file cannot be read.
    """
    digest = hashlib.new(algorithm, prefix, usedforsecurity=False)
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    try:
        with path.open("rb", buffering=0) as stream:
            while length := stream.readinto(buffer):
                digest.update(buffer[:length])
                if on_bytes is not None:
                    on_bytes(length)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); check its permissions and the disk") from None
    return digest.hexdigest()
