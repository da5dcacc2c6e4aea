"""The command line: ``dsv4``. Commands parse, call and print; what they call is imported when they run."""

from __future__ import annotations

import gc
import os
from typing import Annotated

import typer

from dsv4_convert.cli import (
    compile,
    convert,
    diff,
    doctor,
    download,
    export,
    generate,
    golden,
    inspect,
    names,
    parity,
    push,
    report,
    verify,
)
from dsv4_convert.cli.common import one_of, parse_choice, plain, reported
from dsv4_convert.cli.defaults import project_defaults
from dsv4_convert.cli.flags import Command, Group
from dsv4_convert.cli.interrupt import interruptible

#: When output has colours.
_COLORS = ("auto", "always", "never")

app = typer.Typer(
    name="dsv4",
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    help="Bring DeepSeek-V4 into JAX and know that it is right.\n\n"
    "[bold]convert[/bold] turns a Hugging Face checkpoint into Orbax, [bold]parity[/bold] compares every intermediate "
    "activation with a recorded golden. Exit codes: 0 fine, 1 a check failed, 2 usage, 3 bad input, 4 resources, "
    "70 a bug in dsv4, 130 interrupted (Ctrl-C, SIGTERM).\n\n"
    "Example: dsv4 convert hf-to-orbax deepseek-ai/DeepSeek-V4-Flash ./flash-orbax --layers 2-3",
)

_convert = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    help="Convert checkpoints.\n\nExample: dsv4 convert hf-to-orbax ./DeepSeek-V4-Flash ./flash-orbax --dry-run",
)
_convert.command("hf-to-orbax", cls=Command)(convert.hf_to_orbax)
_convert.command("orbax-to-hf", cls=Command)(export.orbax_to_hf)
app.add_typer(_convert, name="convert")
app.command("download", cls=Command)(download.download)
app.command("push", cls=Command)(push.push)
app.command("verify", cls=Command)(verify.verify)
app.command("inspect", cls=Command)(inspect.inspect)
app.command("diff", cls=Command)(diff.diff)
_golden = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    help="Record and look at goldens: what a reference model computes.\n\n"
    "Example: dsv4 golden record ./DeepSeek-V4-Flash --out ./flash-golden --random 300 --layers 0-3",
)
_golden.command("record", cls=Command)(golden.record)
_golden.command("show", cls=Command)(golden.show)
_golden.command("verify", cls=Command)(golden.verify)
_golden.command("compact", cls=Command)(golden.compact)
_golden.command("diff", cls=Command)(golden.diff)
_golden.command("make-checkpoint", cls=Command)(golden.make_checkpoint)
app.add_typer(_golden, name="golden")
app.command("parity", cls=Command)(parity.parity)
app.command("report", cls=Command)(report.report)
app.command("generate", cls=Command)(generate.generate)
app.command("compile", cls=Command)(compile.compile)
app.command("names", cls=Command)(names.names)
app.command("doctor", cls=Command)(doctor.doctor)


def _version(wanted: bool) -> None:
    """The versions that a report of a bug needs; of metadata alone, so that nothing is imported."""
    if not wanted:
        return
    import importlib.metadata
    import platform

    from dsv4_convert import __version__

    typer.echo(__version__)
    for package in ("jax", "flax", "orbax-checkpoint"):
        typer.echo(f"{package} {importlib.metadata.version(package)}")
    typer.echo(f"Python {platform.python_version()}, {platform.platform()}")
    raise typer.Exit


def _color(when: str) -> None:
    parse_choice("--color", when, _COLORS)
    if when == "never":
        os.environ["NO_COLOR"] = "1"
    elif when == "always":
        os.environ.pop("NO_COLOR", None)
        os.environ["DSV4_COLOR"] = "always"


@app.callback()
@reported
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the versions and exit."),
    ] = False,
    color: Annotated[
        str,
        typer.Option("--color", **one_of(*_COLORS), envvar="DSV4_COLOR", help="When output has colours."),
    ] = "auto",
) -> None:
    """Options of dsv4 itself."""
    _color(color)
    context.default_map = dict(project_defaults())


def main() -> None:
    """Entry point of the ``dsv4`` command."""
    gc.set_threshold(10_000)  # imports make objects that stay: looking among them for garbage took a tenth of a start
    if plain():
        from typer import rich_utils

        rich_utils.COLOR_SYSTEM = None  # of itself rich leaves the colours out, and keeps bold and dim
    with interruptible():
        app()
