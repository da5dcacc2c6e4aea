"""The place beside a destination in which it grows until it is complete. One writer at a time uses it.

::

    DEST.dsv4-lock       locked while a process writes; the system releases the lock when the process ends or is killed
    DEST.dsv4-partial/   the stage
      ...                finished work, from which the same command resumes
      replaced           the former destination while it is being overwritten

Conversions, exports, recordings and random checkpoints all use these names. No command resumes or deletes the stage of
another command. A run with the same settings resumes an interrupted run; a run with other settings refuses to start.
Only a rename creates the destination, so a killed process leaves it absent, resumable or complete.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from dsv4_convert.errors import ResourceError, UsageError, listed
from dsv4_convert.files.limits import nearest_folder
from dsv4_convert.files.writing import sync, writing

#: Added to the name of a destination.
SUFFIX, _LOCK_SUFFIX = ".dsv4-partial", ".dsv4-lock"
#: Temporary files of a killed :func:`~dsv4_convert.files.writing.atomic_write`, of this or an earlier version.
_HALF_WRITTEN = re.compile(r"\.(?P<name>.+?)(\.[0-9a-f]{8})?\.tmp")
#: Patience for the lock: its holder may be about to end and remove it.
_PATIENCE_SECONDS = 0.2
#: Prefix of the names of short-lived folders.
_SCRATCH = ".dsv4-probe-"


def require_writable(destination: Path) -> None:
    """Refuse a destination that obviously cannot be made, before any work.

    Raises:
        ResourceError: something above it is a file, or its folder takes no new files.
    """
    folder = nearest_folder(Path(os.path.abspath(destination)).parent)
    if not folder.is_dir():
        raise _unwritable(destination, f"{folder} is a file")
    effective = os.access in os.supports_effective_ids
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=effective):
        number = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
        raise _unwritable(destination, f"{folder}: {os.strerror(number)}")
    if not os.statvfs(folder).f_blocks:  # such as /proc
        raise _unwritable(destination, f"{folder} takes no new files")


def _unwritable(destination: Path, why: str) -> ResourceError:
    return ResourceError(
        f"{destination}: cannot be written ({why}). Nothing was written; choose another destination, or fix the cause."
    )


def stage_of(destination: Path) -> Path:
    """The stage of ``destination``, whether it exists or not; absolute, as ``.`` has no name."""
    path = Path(os.path.abspath(destination))
    return path.parent / (path.name + SUFFIX)


def destination_of(stage: Path) -> Path:
    """The destination that :func:`stage_of` gives ``stage`` for."""
    path = Path(os.path.abspath(stage))
    return path.parent / path.name.removesuffix(SUFFIX)


def refuse_other_settings(
    stage: Path, what: str, *, then: Mapping[str, Any], now: Mapping[str, Any], discard: str = "--restart"
) -> None:
    """Raise :class:`UsageError` if an earlier run had other settings; the error names them and the ways out.

    Args:
        stage: what the earlier run has left.
        what: what it was, such as ``conversion``.
        then: its settings: JSON.
        now: those of this run.
        discard: what discards it.
    """
    differing = [
        f"{key}: {_short(then.get(key))} then, {_short(now.get(key))} now"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]
    if differing:
        raise UsageError(
            f"{stage}: an unfinished {what} with other settings is here:\n{listed(differing)}\n"
            "Run with the former settings and source to finish it, choose another destination, or "
            f"{discard} to discard it."
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 400 else f"{text[:400]}…"


class Workspace:
    """The lock and the stage of one destination; a context manager.

    Attributes:
        destination: absolute.
        stage: the folder beside it, made when the block is entered.
        content: what becomes the destination: the stage itself, or a folder in it.
    """

    def __init__(self, destination: Path, own: re.Pattern[str], *, content: str = "", in_place: bool = False) -> None:
        """
        Args:
            destination: a local path.
            own: the names that the caller writes in the stage.
            in_place: the stage is at the destination itself; it is never published.
            content: name of the folder in the stage that becomes the destination; the stage itself if empty. While
                the work is not published, the stage holds some folder then.
        """
        self.destination = Path(os.path.abspath(destination))
        self.stage = self.destination if in_place else stage_of(destination)
        self.content = self.stage / content
        self._own = own
        self._replaced = self.stage / "replaced"

    def __enter__(self) -> Self:
        """Take the lock, make the stage, and clean up after a run that was killed.

        Raises:
            UsageError: the stage holds something that the caller does not write.
            ResourceError: another process writes the same destination, or the stage cannot be made or locked.
        """
        with ExitStack() as held:
            lock = self.destination.with_name(self.destination.name + _LOCK_SUFFIX)
            held.enter_context(locked(lock, self.destination))
            with writing(self.stage):
                self.stage.mkdir(exist_ok=True)
                held.callback(self._remove_if_empty)
                self._refuse_others()
                self._clean_up()
            self._held = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.__exit__(kind, error, trace)

    def clear(self) -> None:
        """Discard what is in the stage."""
        with writing(self.stage):
            for entry in self.stage.iterdir():
                _remove(entry)

    def publish(self) -> None:
        """Rename the content to the destination; what was there before, and the rest of the stage, is then removed.

        Raises:
            ResourceError: the disk fails, or what is left of the stage cannot be removed.
        """
        with writing(self.destination):
            sync(self.content)
            if self.content != self.stage and os.path.lexists(self.destination):
                self.destination.rename(self._replaced)
            self.content.rename(self.destination)
            sync(self.destination.parent)
        try:
            if self.content != self.stage:
                shutil.rmtree(self.stage)
        except OSError as error:
            raise ResourceError(
                f"{self.destination}: complete, but {self.stage} cannot be removed ({error}); remove it yourself"
            ) from error

    def _refuse_others(self) -> None:
        names = sorted(entry.name for entry in self.stage.iterdir())
        if others := [name for name in names if not self._own.fullmatch(_HALF_WRITTEN.sub(r"\g<name>", name))]:
            raise UsageError(
                f"{self.stage}: holds files that this command did not write, perhaps the unfinished work of another:\n"
                f"{listed(others, limit=5)}\n"
                "Choose another destination, finish it with the command that began it, or remove the folder."
            )

    def _clean_up(self) -> None:
        """Remove files that were not finished; undo or finish a :meth:`publish` that was killed."""
        for folder in {self.stage, self.content}:
            for entry in folder.iterdir() if folder.is_dir() else ():
                if _HALF_WRITTEN.fullmatch(entry.name):
                    entry.unlink()
        if self.content != self.stage:
            if self._replaced.exists() and not os.path.lexists(self.destination):
                self._replaced.rename(self.destination)
            if not any(entry.is_dir() for entry in self.stage.iterdir() if entry != self._replaced):
                self.clear()

    def _remove_if_empty(self) -> None:
        with suppress(OSError):  # not empty, or published
            self.stage.rmdir()


@contextmanager
def locked(lock: Path, guarded: Path) -> Iterator[None]:
    """Hold a lock file, which is removed at the end; the system releases it if the process dies.

    Args:
        lock: the file; its folder is made if needed.
        guarded: what nobody else may write meanwhile.

    Raises:
        ResourceError: another process holds it, or the file system has no locks.
    """
    held = FileLock(lock, timeout=_PATIENCE_SECONDS, thread_local=False, fallback_to_soft=False)
    try:
        held.acquire()
    except OSError as error:  # Timeout is one
        if isinstance(error, Timeout) and lock.exists():
            holder = ""
            with suppress(OSError):
                holder = lock.read_bytes()[:32].decode("ascii", "replace").strip()
            raise ResourceError(
                f"{guarded}: another process{f' (pid {holder})' if holder else ''} is writing it and holds {lock}. "
                "Wait for it, or end it and run the same command again."
            ) from None
        if not os.path.lexists(lock):
            why = "is a file" if lock.parent.is_file() else "takes no new files"
            raise _unwritable(guarded, f"{lock.parent} {why}") from error
        raise ResourceError(
            f"{lock}: cannot write and lock it ({error.strerror or error}), so nothing would keep two runs apart; "
            "make room (or fix the cause) and run the same command again, or choose another destination, on a file "
            "system that has locks"
        ) from error
    try:
        with writing(lock):
            lock.write_bytes(f"{os.getpid()}\n".encode())
        yield
    finally:
        with suppress(OSError):  # while it is held: whoever has opened it meanwhile sees that it is gone
            lock.unlink()
        held.release()


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder for a moment. Those that killed processes left, whose locks nobody holds, are removed first."""
    for left in {entry.with_suffix("") for entry in parent.glob(f"{_SCRATCH}*")}:
        with suppress(OSError, ResourceError), locked(left.with_suffix(".lock"), left):
            shutil.rmtree(left, ignore_errors=True)
    folder = parent / f"{_SCRATCH}{secrets.token_hex(4)}"
    with locked(folder.with_suffix(".lock"), parent), writing(folder):
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()
