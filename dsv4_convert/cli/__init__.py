"""The command line: ``dsv4``. Commands parse, call and print; what they call is imported when they run."""

from __future__ import annotations

from typing import Annotated

import typer

from dsv4_convert.cli import (
    compile,
    convert,
    doctor,
    download,
    export,
    generate,
    golden,
    inspect,
    names,
    parity,
    report,
    verify,
)
from dsv4_convert.cli.common import plain
from dsv4_convert.cli.interrupt import interruptible

app = typer.Typer(
    name="dsv4",
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
    no_args_is_help=True,
    help="Convert checkpoints.\n\nExample: dsv4 convert hf-to-orbax ./DeepSeek-V4-Flash ./flash-orbax --dry-run",
)
_convert.command("hf-to-orbax")(convert.hf_to_orbax)
_convert.command("orbax-to-hf")(export.orbax_to_hf)
app.add_typer(_convert, name="convert")
app.command("download")(download.download)
app.command("verify")(verify.verify)
app.command("inspect")(inspect.inspect)
_golden = typer.Typer(
    no_args_is_help=True,
    help="Record and look at goldens: what a reference model computes.\n\n"
    "Example: dsv4 golden record ./DeepSeek-V4-Flash --out ./flash-golden --random 300 --layers 0-3",
)
_golden.command("record")(golden.record)
_golden.command("show")(golden.show)
_golden.command("verify")(golden.verify)
_golden.command("compact")(golden.compact)
_golden.command("diff")(golden.diff)
_golden.command("make-checkpoint")(golden.make_checkpoint)
app.add_typer(_golden, name="golden")
app.command("parity")(parity.parity)
app.command("report")(report.report)
app.command("generate")(generate.generate)
app.command("compile")(compile.compile)
app.command("names")(names.names)
app.command("doctor")(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        from dsv4_convert import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of dsv4 itself."""


def main() -> None:
    """Entry point of the ``dsv4`` command."""
    if plain():
        from typer import rich_utils

        rich_utils.COLOR_SYSTEM = None  # of itself rich leaves the colours out, and keeps bold and dim
    with interruptible():
        app()
