"""What the commands share: reporting errors by exit code, progress on stderr, JSON, and the layer argument."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer

from dsv4_convert.errors import Dsv4Error, UsageError

if TYPE_CHECKING:
    from rich.progress import Progress

    from dsv4_convert.store import Processes

P = ParamSpec("P")
R = TypeVar("R")

#: ``--layer`` / ``--layers`` of every command that has one.
LAYERS_HELP = "Layers: 12, 0-3, 0,4-6 or all."

Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON to FILE, or to stdout for '-'."),
]

Coordinator = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Share the work with other processes: where process 0 listens. auto, and nothing else, on a TPU slice or "
        "a cluster that JAX knows.",
    ),
]
NumProcesses = Annotated[int | None, typer.Option(min=1, help="How many processes share the work.")]
ProcessId = Annotated[int | None, typer.Option(min=0, help="The number of this one, from 0.")]

Platform = Annotated[
    str | None, typer.Option(metavar="[cpu|gpu|tpu]", help="What computes. What JAX finds first, if not given.")
]


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """Turn our errors into one message on stderr and the exit code of their class; no traceback."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except Dsv4Error as error:
            typer.secho("error: ", fg=typer.colors.RED, bold=True, err=True, nl=False)
            typer.echo(str(error), err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            typer.echo("interrupted; conversions, downloads and recordings go on with the same command", err=True)
            raise typer.Exit(130) from None

    return wrapper


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """``"0-3,7"`` to ``(0, 1, 2, 3, 7)``; None and ``"all"`` to None. Raises :class:`UsageError`."""
    if text is None or text.strip().lower() == "all":
        return None
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        bounds = [first, last] if dash else [first]
        if not all(bound.isascii() and bound.isdecimal() for bound in bounds) or int(bounds[-1]) < int(bounds[0]):
            raise UsageError(f"layers {text!r}: expected numbers and ranges such as 12, 0-3 or 0,4-6, or all")
        layers.update(range(int(bounds[0]), int(bounds[-1]) + 1))
    return tuple(sorted(layers))


def parse_choice(option: str, text: str, allowed: Iterable[str]) -> Any:
    """``text``, if it is one of the words allowed. Raises :class:`UsageError`."""
    words = list(allowed)
    if text not in words:
        raise UsageError(f"{option} {text}: expected one of {', '.join(words)}")
    return text


def parse_bytes(option: str, text: str) -> int:
    """``"800MiB"``, ``"1.5 GB"`` or a plain number of bytes. Raises :class:`UsageError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?", text.strip())
    if match is None or not float(match[1]):
        raise UsageError(f"{option} {text}: expected a size such as 800MiB, 4GiB or 4GB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))


def write_json(document: Any, target: str | None) -> None:
    """Write ``document`` where ``--json`` says; nothing for None."""
    if target is None:
        return
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        with open(target, "w", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise UsageError(f"--json {target}: cannot be written ({error.strerror})") from None


def join_processes(coordinator: str | None, count: int | None, index: int | None) -> Processes:
    """The processes that share the work. Raises :class:`UsageError` where they are named by halves."""
    from dsv4_convert.errors import UsageError
    from dsv4_convert.store.orbax_processes import current_processes, join

    if count is None and index is None and coordinator in (None, "auto"):
        return current_processes() if coordinator is None else join()
    if coordinator is None or count is None or index is None or index >= count:
        raise UsageError(
            "several processes need all of --coordinator HOST:PORT, --num-processes and --process-id, from 0 on; or "
            "--coordinator auto alone, where JAX knows its neighbours"
        )
    return join(coordinator, count, index)


@contextmanager
def own_stdout(processes: Processes) -> Iterator[None]:
    """Keep stdout for the result: what connects several processes announces itself there. That goes to stderr."""
    if processes.count == 1:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def byte_progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr for (done, total, what) in bytes; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield functools.partial(_advance, bar, task, title)


def _advance(bar: Progress, task: Any, title: str, done: int, total: int, what: str) -> None:
    bar.update(task, completed=done, total=total, description=f"{title} {what}"[:48])


@contextmanager
def status(title: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done; silent where stderr is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status(title) as line:
        yield lambda text: line.update(f"{title}: {text}")


def size(nbytes: float) -> str:
    """Bytes for people: ``159.6 GB`` (powers of 1000, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError("unreachable")
