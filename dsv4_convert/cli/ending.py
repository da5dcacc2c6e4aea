"""The last lines of a command, on stderr: the files that it wrote, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import typer

from dsv4_convert.errors import CheckFailed
from dsv4_convert.units import duration

#: The files that the command has written, by what they are.
_WROTE: ContextVar[list[tuple[str, str]]] = ContextVar("wrote")


def wrote(what: str, path: str | Path) -> None:
    """Have the path of a file that was written among the last lines of the command."""
    _WROTE.get([]).append((what, Path(path).absolute().as_uri()))


@contextmanager
def ending() -> Iterator[None]:
    """End a command that ran its course: say what it wrote and, where that is over a second, how long it took."""
    begun, token = time.monotonic(), _WROTE.set([])
    try:
        try:
            yield
        except (typer.Exit, CheckFailed):
            _say(begun)
            raise
        _say(begun)
    finally:
        _WROTE.reset(token)


def _say(begun: float) -> None:
    for what, path in _WROTE.get():
        typer.echo(f"{what:<8}{path}", err=True)
    if (seconds := time.monotonic() - begun) >= 1:
        typer.echo(f"took    {duration(seconds)}", err=True)
