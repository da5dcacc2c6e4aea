"""The last lines of a command, on stderr: the files that it wrote, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import typer

from dsv4_convert.errors import CheckFailed
from dsv4_convert.show.units import duration

#: The files that the command has written, by what they are.
_WROTE: ContextVar[list[tuple[str, str]]] = ContextVar("wrote")
#: When the command began, by :func:`time.monotonic`.
_BEGUN: ContextVar[float] = ContextVar("begun")


def wrote(what: str, path: str | Path) -> None:
    """Have the path of a file that was written among the last lines of the command."""
    _WROTE.get([]).append((what, Path(path).absolute().as_uri()))


@contextmanager
def ending() -> Iterator[None]:
    """End a command that ran its course: say what it wrote and, where that is over a second, how long it took."""
    begun, written = _BEGUN.set(time.monotonic()), _WROTE.set([])
    try:
        try:
            yield
        except (typer.Exit, CheckFailed):
            _say()
            raise
        _say()
    finally:
        _WROTE.reset(written)
        _BEGUN.reset(begun)


def seconds() -> float:
    """How long the command has run so far."""
    return time.monotonic() - _BEGUN.get(time.monotonic())


def _say() -> None:
    for what, path in _WROTE.get():
        typer.echo(f"{what:<8}{path}", err=True)
    if seconds() >= 1:
        typer.echo(f"took    {duration(seconds())}", err=True)
