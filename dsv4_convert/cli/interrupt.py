"""SIGINT and SIGTERM: a command ends with exit code 130 in under two seconds, whatever it is doing.

Python calls a signal's handler between two of its own instructions, so not while XLA or Numba computes, and a
KeyboardInterrupt that reaches a callback of theirs is lost. If the interpreter shuts down while their threads compute,
the process crashes. So a thread of its own reads the signal from a file descriptor, gives the command a moment to leave
in order, and then ends the process without a shutdown. Nothing on a disk depends on that moment: what a killed process
leaves is resumable, too.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

#: The exit code of an interrupted command: 128 and the number of SIGINT.
INTERRUPTED = 130

#: Seconds between the signal and the end of the process.
GRACE = 1.5

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = b"\x1b[?25h"

_said = threading.Lock()
_message = "interrupted"


def announce(message: str) -> None:
    """Set what this process says when a signal ends it."""
    global _message, _said
    _message, _said = message, threading.Lock()


@contextmanager
def interruptible() -> Iterator[None]:
    """End the process with :data:`INTERRUPTED` after a signal, at most :data:`GRACE` seconds later.

    The block gets KeyboardInterrupt in the main thread where Python can deliver it, and may end by ``SystemExit(130)``.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in _SIGNALS:
        signal.signal(number, signal.default_int_handler)
    threading.Thread(target=_watch, args=(read,), name="signals", daemon=True).start()
    report = sys.unraisablehook
    sys.unraisablehook = lambda lost: None if isinstance(lost.exc_value, KeyboardInterrupt) else report(lost)
    try:
        yield
    except KeyboardInterrupt:
        say_interrupted()
        leave()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            say_interrupted()
            leave()
        raise
    finally:
        sys.unraisablehook = report
        signal.set_wakeup_fd(-1)
        os.close(write)  # which the thread reads as the end
        for number in _SIGNALS:  # from here on a signal ends the process at once
            signal.signal(number, signal.SIG_DFL)


def say_interrupted() -> None:
    """Print the announced message to stderr, unless it was printed before."""
    if _said.acquire(blocking=False):
        with suppress(OSError, ValueError):
            sys.stderr.write(f"{_message}\n")
            sys.stderr.flush()


def leave() -> None:
    """End the process now: no shutdown, while threads that Python does not know may compute."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(INTERRUPTED)


def _watch(descriptor: int) -> None:
    while received := os.read(descriptor, 1):
        if received[0] in _SIGNALS:
            time.sleep(GRACE)
            if os.isatty(2):  # a spinner hides it
                os.write(2, _SHOW_CURSOR)
            say_interrupted()
            os._exit(INTERRUPTED)
    os.close(descriptor)
