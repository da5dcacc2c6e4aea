"""SIGINT and SIGTERM: a command ends with exit code 130 at once, whatever it is doing.

Python calls a signal's handler in the main thread, between two of its own instructions: not while XLA or Numba
computes. An exception from it can be lost in a callback of theirs, or crash the process on its way through their code.
So the handlers only note the signal; a thread reads it from a file descriptor and ends the process without a shutdown.
Nothing on a disk depends on an orderly end: what a killed process leaves is absent, resumable or complete, too.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

#: The exit code of an interrupted command: 128 and the number of SIGINT.
INTERRUPTED = 130

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = b"\x1b[?25h"

_message = "interrupted"


def announce(message: str) -> None:
    """Set what this process says when a signal ends it."""
    global _message
    _message = message


def announced() -> str:
    """What this process says when it is interrupted."""
    return _message


@contextmanager
def interruptible() -> Iterator[None]:
    """End the process with :data:`INTERRUPTED` as soon as a signal comes. The block does not see the signal."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    came = threading.Event()
    for number in _SIGNALS:
        signal.signal(number, lambda *_: came.set())
    watcher = threading.Thread(target=_watch, args=(read,), name="signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        if came.is_set():  # and the block ended before the thread's turn, perhaps by a call that the signal cut short
            watcher.join()
        signal.set_wakeup_fd(-1)
        os.close(write)  # which the thread reads as the end
        for number in _SIGNALS:  # from here on a signal ends the process at once
            signal.signal(number, signal.SIG_DFL)


def _watch(descriptor: int) -> None:
    while received := os.read(descriptor, 1):
        if received[0] in _SIGNALS:
            message = f"{_message}\n".encode()
            if os.isatty(2):  # a progress line hides the cursor, and has no end
                message = _SHOW_CURSOR + b"\n" + message
            with suppress(OSError):  # past Python's buffer, whose lock another thread may hold
                os.write(2, message)
            os._exit(INTERRUPTED)
    os.close(descriptor)
