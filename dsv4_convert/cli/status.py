"""Progress on stderr.

In a terminal, it is one line that changes; in a terminal without escape codes or in a file, a line now and then.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from dsv4_convert.cli.common import console, echo, plain
from dsv4_convert.show.compiling import listen, tell
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
        parts = [": ".join(part for part in (self._title, self._text) if part)]
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
        with noting_compilations(shown):
            yield shown
        return

    def out(text: str) -> None:
        screen.print(text, highlight=False, soft_wrap=True)

    shown = Status(title, lambda now: None, out, screen.width)
    with screen.status(shown), noting_compilations(shown):
        yield shown


class Noted(Protocol):
    """Something that shows a note while it is not empty."""

    note: str


#: What is shown now.
_SHOWN: list[Noted] = []


@contextmanager
def noting_compilations(shown: Noted) -> Iterator[None]:
    """Note while something is compiled that is not in a cache yet."""
    _SHOWN.append(shown)
    try:
        yield
    finally:
        _SHOWN.remove(shown)


def _note(text: str) -> None:
    for shown in _SHOWN:
        shown.note = text


listen(_note)


def note_compilations() -> None:
    """Let JAX tell when it compiles, too. Imports JAX; call it once."""
    from jax import monitoring

    begins = {
        "/jax/compilation_cache/compile_requests_use_cache": True,
        "/jax/compilation_cache/cache_hits": False,
        "/jax/compilation_cache/cache_misses": False,
    }

    def heard(event: str, **_: Any) -> None:
        if event in begins:
            tell(begins=begins[event])

    monitoring.register_event_listener(heard)


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
    screen = console(err=True)
    if not _animated(screen):
        with _byte_lines(title, screen) as advance:
            yield advance
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    what = what_column()
    columns = (
        what,
        *((BarColumn(bar_width=_BAR),) if screen.width >= _ROOMY else ()),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, transient=True) as bar, noting_compilations(what):
        task = bar.add_task(title, total=None)
        room = screen.width - _NUMBERS - (_BAR if screen.width >= _ROOMY else 0)
        yield functools.partial(_advance, bar, task, title, max(room, 8))


#: Columns of the numbers beside a bar, of the bar, and from how many on there is one.
_NUMBERS, _BAR, _ROOMY = 40, 20, 75


def _advance(bar: Progress, task: Any, title: str, room: int, done: int, total: int, what: str) -> None:
    bar.update(task, completed=done, total=total, description=f"{title} {what}".strip()[:room])


def what_column() -> Any:
    """The column of a bar that says what is done, or its note."""
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class Noting(ProgressColumn):
        note = ""

        def render(self, task: Task) -> Text:
            return Text(self.note or task.description)

    return Noting()


@contextmanager
def _byte_lines(title: str, screen: Console) -> Iterator[Callable[[int, int, str], None]]:
    say = _lines(screen)
    shown = Status(title, lambda now: say(lambda: now.line), functools.partial(echo, err=True), screen.width)

    def advance(done: int, total: int, what: str) -> None:
        shown.step(done, total, f"{what}, {size(done)} of {size(total)}".removeprefix(", "))

    with noting_compilations(shown):
        yield advance


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
