"""Counting the bytes of a download: one counter for all threads, in place of the Hub client's progress bars."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from dsv4_convert.errors import ResourceError

Stage = Literal["download", "verify"]
#: Bytes beyond twice a file's size that may come: a transfer comes in pieces, and may start again.
_SLACK_BYTES = 64 << 20


class Progress(Protocol):
    """Told about every piece of work done. Called from several threads, one at a time."""

    def __call__(self, stage: Stage, done: int, total: int) -> None:
        """``done`` of ``total`` bytes of ``stage`` are finished."""


class Stopped(Exception):
    """Ends a transfer whose result nobody waits for."""


class Meter:
    """Adds up bytes from several threads and tells the caller."""

    def __init__(self, stage: Stage, total: int, progress: Progress | None) -> None:
        self._stage, self._total, self._progress = stage, total, progress
        self._done = 0
        self._lock = threading.Lock()
        self._stopped = False

    def add(self, nbytes: int) -> None:
        """Count ``nbytes`` more (or less, when the client starts a file anew); raises once :meth:`stop` was called."""
        with self._lock:
            if self._stopped:
                raise Stopped
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._stage, self._done, self._total)

    def finish(self) -> None:
        """Report the whole as done: what was found on disk after all never came by."""
        with self._lock:
            if self._progress is not None and self._done < self._total:
                self._progress(self._stage, self._total, self._total)

    def stop(self) -> None:
        """Make every further :meth:`add` raise."""
        with self._lock:
            self._stopped = True

    def bar_class(self, nbytes: int) -> Any:
        """A class that the Hub client takes for a tqdm bar: it prints nothing and counts here.

        It ends a transfer of a file of ``nbytes`` that goes on for ever.
        """
        meter, most = self, 2 * nbytes + _SLACK_BYTES

        class Bar:
            def __init__(self, *_: Any, **__: Any) -> None:
                self._came = 0

            def __enter__(self) -> Self:
                return self

            def __exit__(
                self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
            ) -> None: ...

            def update(self, n: float | None = 1) -> None:
                self._came += int(n or 0)
                if self._came > most:
                    raise ResourceError(f"more than {most:,} bytes came of a file of {nbytes:,}; check HF_ENDPOINT")
                meter.add(int(n or 0))

            def update_transfer(self, n: float | None = 1) -> None:
                """Network bytes of a Xet transfer: not counted, :meth:`update` is told when they reach the disk."""

            def set_postfix_str(self, *_: Any, **__: Any) -> None: ...

            def set_transfer_postfix_str(self, *_: Any, **__: Any) -> None: ...

            def close(self) -> None: ...

        return Bar
