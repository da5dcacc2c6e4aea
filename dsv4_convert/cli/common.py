"""Shared parts of the commands: errors by exit code, JSON, consoles, options and arguments."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeVar

import typer

from dsv4_convert.cli.destination import check_destination, write_text
from dsv4_convert.cli.ending import ending, wrote
from dsv4_convert.cli.interrupt import INTERRUPTED, announce, announced
from dsv4_convert.errors import Dsv4Error, ResourceError, UsageError, did_you_mean
from dsv4_convert.show.text import for_json, for_terminal
from dsv4_convert.show.urls import without_secrets

if TYPE_CHECKING:
    from rich.console import Console

    from dsv4_convert.store import Processes

P = ParamSpec("P")
R = TypeVar("R")

#: The message of an interrupted command that can be resumed.
GO_ON = "interrupted; go on with the same command"

#: The exit code of a bug: EX_SOFTWARE of sysexits.h, so that CI tells it from a check that failed.
_BUG = 70

#: The number of a layer: no model has so many that it takes more digits, and a set of them has to fit in memory.
_LAYER = r"[0-9]{1,5}"
#: ``--layer`` / ``--layers`` of every command that has one.
LAYERS_HELP = "Layers: 12, 0-3, 0,4-6 or all. Default: all."

#: Where a published checkpoint may be, of every command that takes one.
SOURCES = "a folder, ORG/NAME or ORG/NAME@REVISION on the Hub, or gs://bucket/path."
#: A converted checkpoint, likewise.
CHECKPOINT_HELP = "Orbax checkpoint that dsv4 wrote: a folder, or gs://bucket/path."

Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON to FILE, or to stdout for '-'."),
]

#: ``--revision`` of every command that has one.
REVISION_HELP = "Branch, tag or commit of a repository. Default: its default branch."

Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        metavar="",
        show_default=False,
        help="Print more: -v the tables, -vv every number.",
    ),
]

Coordinator = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Share the work with other processes: the address of process 0. On a TPU slice or a cluster that JAX "
        "knows, auto suffices.",
    ),
]
NumProcesses = Annotated[int | None, typer.Option(min=1, help="Number of processes that share the work.")]
ProcessId = Annotated[int | None, typer.Option(min=0, help="Number of this process, from 0.")]


def one_of(*words: str) -> dict[str, Any]:
    """For an option that takes one of these words: what the help shows, and what the shell completes."""
    return {"metavar": f"[{'|'.join(words)}]", "autocompletion": completing(words)}


def completing(words: Iterable[str]) -> Callable[[str], list[str]]:
    """The completion that the shell offers for the beginning of a word."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def complete_taps(incomplete: str) -> list[str]:
    """Names of taps within a layer and of the model level."""
    from dsv4_convert.spec.taps import ALL_TAPS

    return [tap.name for tap in ALL_TAPS if tap.name.startswith(incomplete)]


def complete_names(incomplete: str) -> list[str]:
    """Parameter paths, with the number that stands in the word already."""
    from dsv4_convert.spec.architectures import ARCHITECTURES
    from dsv4_convert.spec.names import template

    numbers = template(incomplete)[1]
    rules = (rule for known in ARCHITECTURES for rule in known.names.rules)
    paths = dict.fromkeys(rule.path.replace("{}", str(numbers[0]) if numbers else "0") for rule in rules)
    return [path for path in paths if path.startswith(incomplete)]


def complete_topologies(incomplete: str) -> list[str]:
    """TPU slices that have a name."""
    from dsv4_convert.aot.topology import CHIPS, Slice

    names = (tpu.name for generation in CHIPS for tpu in Slice.all(generation))
    return [name for name in names if name.startswith(incomplete)]


def complete_generations(incomplete: str) -> list[str]:
    """Generations of TPU."""
    from dsv4_convert.aot.topology import CHIPS

    return [name for name in CHIPS if name.startswith(incomplete)]


Platform = Annotated[
    str | None,
    typer.Option(**one_of("cpu", "gpu", "tpu"), help="Platform that computes. Default: the first that JAX finds."),
]


def plain() -> bool:
    """Whether to print plain text: NO_COLOR is set, or the terminal knows no escape codes."""
    return bool(os.environ.get("NO_COLOR")) or _dumb()


def _dumb() -> bool:
    return os.environ.get("TERM") in ("dumb", "unknown")


def console(*, err: bool = False) -> Console:
    """The console for results, or for stderr: as wide as the window, styled unless plain text is wanted."""
    from rich.console import ConsoleDimensions

    from dsv4_convert.show.screen import Screen

    colors: Literal["auto", "standard"] = "standard" if os.environ.get("DSV4_COLOR") == "always" else "auto"
    screen = Screen(stderr=err, color_system=None if plain() else colors)
    if _dumb() and screen.is_terminal:  # rich takes it to have 80 columns
        screen.size = ConsoleDimensions(*shutil.get_terminal_size())
    return screen


def echo(text: str, *, err: bool = False) -> None:
    """Print a line that is of no table, escaped for a terminal; line ends of data are, too."""
    typer.echo(for_terminal(text).replace("\n", "\\n"), err=err)


def say_error(text: str) -> None:
    """An error on stderr; in a terminal wrapped at words."""
    title, text = "error: ", for_terminal(without_secrets(text))
    if not sys.stderr.isatty():
        typer.echo(title + text, err=True)
        return
    width = max(console(err=True).width, 30)
    lines = [
        textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
        for line in (title + text).split("\n")
    ]
    styled = lines[0] if plain() else lines[0].replace(title, typer.style(title, fg=typer.colors.RED, bold=True), 1)
    typer.echo("\n".join([styled, *lines[1:]]), err=True)


def resumable(command: Callable[P, R]) -> Callable[P, R]:
    """:func:`reported`, for a command that resumes an interrupted one."""
    return reported(command, interrupted=GO_ON)


def reported(command: Callable[P, R], *, interrupted: str = "interrupted") -> Callable[P, R]:
    """Turn errors into one message on stderr and the exit code of their class; only a bug shows a traceback.

    The same holds for what the system refuses where nobody expected it, and for KeyboardInterrupt.
    Checks that ``--json`` is writable before any work.
    """

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        announce(interrupted)
        try:
            if kwargs.get("coordinator") is None:  # of several processes one writes, and tells the others
                check_json(kwargs.get("json"))
            with ending():
                return command(*args, **kwargs)
        except Dsv4Error as error:
            say_error(str(error))
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            if error.errno == errno.EPIPE or error.strerror is None:  # who reads our output has enough; or a bug
                raise
            where = error.filename2 or error.filename or "a file or the output"
            say_error(f"{where}: {error.strerror}; check the path, its permissions and the disk, then run it again")
            _let_go_of_stdout()
            raise typer.Exit(ResourceError.exit_code) from None
        except KeyboardInterrupt:
            typer.echo(announced(), err=True)
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if _out_of_memory(error):
                say_error(f"not enough memory: {str(error).splitlines()[0] if str(error) else 'it is all in use'}")
                raise typer.Exit(ResourceError.exit_code) from None
            if (complaint := _environment(error)) is not None:
                say_error(complaint)
                raise typer.Exit(UsageError.exit_code) from None
            # The values of variables may be private, so the traceback does not show them.
            for line in without_secrets("".join(traceback.format_exception(error))).splitlines():
                echo(line, err=True)
            say_error(
                "this is a bug in dsv4, not a fault of yours. Please report it with the lines above, the command, and "
                "what `dsv4 doctor --json -` prints."
            )
            raise typer.Exit(_BUG) from None

    return wrapper


#: Files of libraries that read environment variables as they are imported, and the beginning of these variables' names.
_READERS = {"jax/_src/config.py": "JAX_", "huggingface_hub/constants.py": "HF_", "matplotlib/__init__.py": "MPL"}


def _environment(error: Exception) -> str | None:
    """What to correct, if a library could not read an environment variable; None for any other error."""
    file = traceback.extract_tb(error.__traceback__)[-1].filename.replace(os.sep, "/")
    for reader, prefix in _READERS.items():
        if file.endswith(reader):
            # A library quotes the value and not always the name.
            named = [name for name, value in os.environ.items() if name.startswith(prefix) and value in str(error)]
            return f"{', '.join(named) or prefix + '*'}: {error}; correct this environment variable or unset it"
    return None


def _let_go_of_stdout() -> None:
    """Drop unprinted output that cannot be written: Python would retry when it ends, and exit with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _out_of_memory(error: Exception) -> bool:
    """Whether Python, or JAX for a device, reports that memory ran out."""
    return isinstance(error, MemoryError) or str(error).startswith("RESOURCE_EXHAUSTED")


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """``"0-3,7"`` to ``(0, 1, 2, 3, 7)``; None and ``"all"`` to None. Raises :class:`UsageError`."""
    if text is None or text.strip().lower() == "all":
        return None
    return tuple(sorted({layer for part in text.split(",") for layer in _range_of(part, text)}))


def parse_layers_and_stages(text: str | None) -> tuple[int | str, ...] | None:
    """As :func:`parse_layers`, with draft stages too: ``"7,mtp.0-1"`` to ``(7, "mtp.0", "mtp.1")``."""
    if text is None or text.strip().lower() == "all":
        return None
    from dsv4_convert.spec.config import STAGE

    chosen: dict[int | str, None] = {}
    for part in text.split(","):
        number = part.strip().removeprefix(STAGE)
        prefix = part.strip().removesuffix(number)
        chosen |= dict.fromkeys(f"{prefix}{at}" if prefix else at for at in _range_of(number, text))
    return tuple(chosen)


def _range_of(part: str, text: str) -> range:
    """``3``, or ``0-3``. Raises :class:`UsageError`, which shows the ``text`` that it is a part of."""
    first, dash, last = part.strip().partition("-")
    bounds = [first, last] if dash else [first]
    if not all(re.fullmatch(_LAYER, bound) for bound in bounds) or int(bounds[-1]) < int(bounds[0]):
        raise UsageError(f"layers {text!r}: expected numbers and ranges such as 12, 0-3 or 0,4-6, or all")
    return range(int(bounds[0]), int(bounds[-1]) + 1)


def parse_choice(option: str, text: str, allowed: Iterable[str]) -> Any:
    """``text``, if it is one of the words allowed. Raises :class:`UsageError`."""
    words = list(allowed)
    if text not in words:
        raise UsageError(f"{option} {text}: expected one of {', '.join(words)}{did_you_mean(text, words)}")
    return text


def parse_bytes(option: str, text: str) -> int:
    """``"800MiB"``, ``"1.5 GB"`` or a plain number of bytes. Raises :class:`UsageError`."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([kKMGT]?)(i?)B?", text.strip())
    if match is None or not float(match[1]):
        raise UsageError(f"{option} {text}: expected a size such as 800MiB, 4GiB or 4GB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))


def check_json(target: Any) -> None:
    """Raise :class:`UsageError` where ``--json`` names what could not be written."""
    check_destination("--json", None if target == "-" else target)


def write_json(document: Any, target: str | None) -> None:
    """Write ``document`` where ``--json`` says; nothing for None. Raises :class:`ResourceError` if that fails."""
    if target is None:
        return
    text = for_json(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    write_text("--json", target, text)
    wrote("json", target)


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
    host, _, port = coordinator.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise UsageError(f"--coordinator {coordinator}: expected HOST:PORT, such as 10.0.0.1:8476")
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
