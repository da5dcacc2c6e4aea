"""Progress on stderr.

In a terminal, it is one line that changes; in a terminal without escape codes or in a file, a line now and then.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dsv4_convert.cli.common import console, echo, plain
from dsv4_convert.show.units import clock, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text

    from dsv4_convert.checkpoint import Checkpoint

#: Seconds between two lines of progress: in a terminal that takes no escape codes, and where stderr is no terminal.
_LINE_EVERY, _LOG_EVERY = 2.0, 30.0


class Status:
    """One line: what is being done, how long it has taken, and how long the rest may take."""

    def __init__(self, title: str, show: Callable[[Status], None], out: Callable[[str], None], width: int) -> None:
        self._title, self._show, self._out, self._width = title, show, out, width
        self._begun = time.monotonic()
        self._text = ""
        #: When the first step was finished, and its number: later ones tell the speed, since the first compiles.
        self._first: tuple[float, int] | None = None
        #: When all steps will be finished, as far as that can be told.
        self._end: float | None = None
        #: Added to the text while it is not empty.
        self.note = ""

    def __call__(self, text: str) -> None:
        """Say what is done next."""
        self.step(0, 0, text)

    def step(self, done: int, total: int, text: str) -> None:
        """Say what is done next, after ``done`` of ``total`` steps."""
        now = time.monotonic()
        self._text, self._end = text, None
        if done and self._first is None:
            self._first = (now, done)
        elif self._first is not None and done > self._first[1]:
            since, first = self._first
            self._end = now + (now - since) / (done - first) * (total - done)
        self._show(self)

    def print(self, *lines: str) -> None:
        """Print lines that stay, on stderr, above the status."""
        for line in lines:
            self._out(line)

    @property
    def line(self) -> str:
        """The line as it is now."""
        seconds = time.monotonic() - self._begun
        parts = [f"{self._title}: {self._text}" if self._text else self._title]
        if self.note:
            parts.append(self.note)
        if seconds >= 1:
            parts.append(f"{clock(seconds)} elapsed")
        if self._end is not None and (left := self._end - time.monotonic()) >= 1:
            parts.append(f"{clock(left)} left")
        return ", ".join(parts)

    def __rich__(self) -> Text:
        """The line, cut to the window."""
        from rich.text import Text

        return Text(self.line[: max(self._width - 3, 10)])


@contextmanager
def status(title: str) -> Iterator[Status]:
    """Say on stderr what is being done."""
    screen = console(err=True)
    if not _animated(screen):
        say = _lines(screen)
        shown = Status(title, lambda now: say(lambda: now.line), functools.partial(echo, err=True), screen.width)
        with _compilations(shown):
            yield shown
        return

    def out(text: str) -> None:
        screen.print(text, highlight=False, soft_wrap=True)

    shown = Status(title, lambda now: None, out, screen.width)
    with screen.status(shown), _compilations(shown):
        yield shown


@contextmanager
def _compilations(shown: Status) -> Iterator[None]:
    """Note while XLA compiles what is not in its cache yet; the listener costs nothing where JAX is not loaded."""
    _SHOWN.append(shown)
    try:
        yield
    finally:
        _SHOWN.remove(shown)


#: The place where compilations are noted.
_SHOWN: list[Status] = []


def note_compilations() -> None:
    """Let JAX tell the status line when it compiles. Imports JAX; call it once."""
    from jax import monitoring

    def listen(event: str, **_: Any) -> None:
        note = {
            "/jax/compilation_cache/compile_requests_use_cache": "compiling, once",
            "/jax/compilation_cache/cache_hits": "",
            "/jax/compilation_cache/cache_misses": "",
        }.get(event)
        if note is not None:
            for shown in _SHOWN:
                shown.note = note

    monitoring.register_event_listener(listen)


def note_fetched(checkpoint: Checkpoint, shown: Status) -> None:
    """Note how much of a checkpoint has come that is somewhere else."""
    from dsv4_convert.convert.shards import as_arriving

    arriving = as_arriving(checkpoint)
    if arriving is not None:

        def note() -> None:
            shown.note = f"{size(arriving.fetched)} of {size(arriving.to_fetch)} fetched"

        arriving.on_bytes = note


@contextmanager
def byte_progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """How far something is, on stderr, for (done, total, what) in bytes: a bar, or a line now and then."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    screen = console(err=True)
    if not _animated(screen):
        say = _lines(screen)
        yield lambda done, total, what: say(lambda: f"{title} {what}: {size(done)} of {size(total)}".lstrip())
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        *((BarColumn(bar_width=_BAR),) if screen.width >= _ROOMY else ()),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task(title, total=None)
        room = screen.width - _NUMBERS - (_BAR if screen.width >= _ROOMY else 0)
        yield functools.partial(_advance, bar, task, title, max(room, 8))


#: Columns of the numbers beside a bar, of the bar, and from how many on there is one.
_NUMBERS, _BAR, _ROOMY = 40, 20, 75


def _advance(bar: Progress, task: Any, title: str, room: int, done: int, total: int, what: str) -> None:
    bar.update(task, completed=done, total=total, description=f"{title} {what}".strip()[:room])


def _animated(screen: Console) -> bool:
    return screen.is_terminal and not plain()


def _lines(screen: Console) -> Callable[[Callable[[], str]], None]:
    """Print status messages at intervals: often to a terminal, seldom to a file."""
    every = _LINE_EVERY if screen.is_terminal else _LOG_EVERY
    last = time.monotonic()

    def say(text: Callable[[], str]) -> None:
        nonlocal last
        if time.monotonic() - last >= every:
            last = time.monotonic()
            echo(text(), err=True)

    return say
