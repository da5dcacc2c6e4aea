"""``dsv4 parity``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsv4_convert.cli.common import LAYERS_HELP, Json, parse_layers, reported, status, write_json


@reported
def parity(
    checkpoint: Annotated[Path, typer.Argument(help="Orbax checkpoint that dsv4 wrote.")],
    golden: Annotated[Path, typer.Option(help="Golden to compare with (see dsv4 golden record).")],
    layer: Annotated[str, typer.Option("--layer", "--layers", help=LAYERS_HELP)] = "all",
    taps: Annotated[
        list[str] | None,
        typer.Option(help="Compare only taps that match, such as 'attn.*' or 'layers.3.ffn.gate.*'; may be repeated."),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            metavar="[isolated|cumulative]",
            help="isolated: every layer runs on the golden's own input. cumulative: from the tokens, so errors add up.",
        ),
    ] = "isolated",
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="One line per layer, and the taps that do not pass.")
    ] = False,
    json: Json = None,
) -> None:
    """Run the JAX layers and compare every intermediate activation with a golden.

    Names the first operation that diverges; exits 1 if any does. Only the weights that the prompt reaches are read.

    Example: dsv4 parity ./flash-orbax --golden ./flash-golden --layer 12
    """
    from dsv4_convert.errors import CheckFailed, UsageError

    layers = parse_layers(layer)
    from parity.render import render
    from parity.run import run
    from parity.tolerances import Mode

    if mode not in list(Mode):
        raise UsageError(f"--mode {mode}: expected one of {', '.join(Mode)}")
    with status("parity") as say:
        report = run(
            checkpoint,
            golden,
            layers=layers,
            taps=taps or (),
            mode=Mode(mode),
            progress=lambda at: say("model level" if at is None else f"layer {at}"),
        )
    write_json(report.to_json(), json)
    from rich.console import Console

    render(report, Console(stderr=json == "-"), every_tap=not quiet)
    if not report.passed:
        raise typer.Exit(CheckFailed.exit_code)
