"""``dsv4 compile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsv4_convert.cli.common import (
    Json,
    complete_generations,
    complete_topologies,
    console,
    one_of,
    parse_choice,
    reported,
    write_json,
)
from dsv4_convert.cli.status import status


@reported
def compile(
    config: Annotated[
        Path, typer.Option(help="config.json of a model, or a folder that has one: published, or converted.")
    ],
    topology: Annotated[
        str | None,
        typer.Option(
            help="TPU slice: a name such as v5p-512, or its shape in chips such as v5p:4x8x8.",
            autocompletion=complete_topologies,
        ),
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            help="Mesh of the devices, such as fsdp=8,expert=32. Axes: data (prompts), fsdp (prompts, and "
            "matrices along one side), expert (prompts, and the routed experts), tensor (heads, inner widths, "
            "vocabulary), sequence (tokens of a prompt). Default: a mesh that suits the model."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt; room in the cache with --decode.")] = 4096,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Number of prompts. Default: one per shard of the batch.")
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="One step of decoding from the cache, instead of whole prompts.")
    ] = False,
    weights: Annotated[
        str,
        typer.Option(
            **one_of("bfloat16", "source"),
            help="source: quantised matrices stay published codes and scales, and are decoded at every use.",
        ),
    ] = "bfloat16",
    layers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Compile only the first N layers. Default: all.")
    ] = None,
    find_mesh: Annotated[
        str | None,
        typer.Option(
            "--find-mesh",
            metavar="TPU",
            autocompletion=complete_generations,
            help="Instead of --topology: find the smallest slice that fits.",
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Compile the whole model for a TPU slice without having one, and report whether it fits.

    libtpu's own compiler makes the programs (pip install 'dsv4-convert\\[tpu]'), without a TPU and without weights.
    Prints the memory and work of one device, and the communication between devices. Exits 1 if it does not fit.

    Example: dsv4 compile --config ./DeepSeek-V4-Flash --topology v5p-512 --mesh fsdp=8,expert=32 --tokens 4096

    Example: dsv4 compile --config ./DeepSeek-V4-Pro --find-mesh v6e --decode --tokens 131072
    """
    from dsv4_convert.aot import Slice
    from dsv4_convert.aot.render import render
    from dsv4_convert.aot.search import compile_model, parse_mesh, smallest_slice
    from dsv4_convert.errors import CheckFailed, UsageError
    from dsv4_convert.spec.config import Config

    if (topology is None) == (find_mesh is None):
        raise UsageError("a slice is needed: --topology v5p-512, or --find-mesh v5p to look for the smallest")
    if find_mesh is not None and (mesh is not None or layers is not None):
        raise UsageError("--find-mesh chooses the mesh, for the whole model; leave --mesh and --layers out")
    source = parse_choice("--weights", weights, ("bfloat16", "source")) == "source"
    model = Config.from_file(config)
    with status("compile") as say:
        if topology is not None:
            say(f"{topology}, which gives no progress")
            where, sizes = Slice.parse(topology), None if mesh is None else parse_mesh(mesh)
            report = compile_model(
                model, where, tokens=tokens, batch=batch, decode=decode, source=source, mesh=sizes, layers=layers
            )
        else:
            assert find_mesh is not None
            report = smallest_slice(
                model, find_mesh, tokens=tokens, batch=batch, decode=decode, source=source, progress=say
            )
    write_json(report.to_json(), json)
    render(report, console(err=json == "-"))
    if not report.fits:
        raise typer.Exit(CheckFailed.exit_code)
