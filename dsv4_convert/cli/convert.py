"""``dsv4 convert hf-to-orbax``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4_convert.cli.common import LAYERS_HELP, Json, byte_progress, parse_layers, reported, size, write_json
from dsv4_convert.cli.download import fetch

if TYPE_CHECKING:
    from dsv4_convert.convert import Plan


@reported
def hf_to_orbax(
    source: Annotated[str, typer.Argument(help="Local folder, or a repository such as deepseek-ai/DeepSeek-V4-Flash.")],
    dest: Annotated[Path, typer.Argument(help="Folder to create.")],
    dtype: Annotated[
        str,
        typer.Option(
            metavar="[bfloat16|float32|source]",
            help="How weights are stored. bfloat16 is exact for FP4 and FP8 weights with power-of-two scales; "
            "source keeps the published bytes and scales.",
        ),
    ] = "bfloat16",
    layers: Annotated[str | None, typer.Option("--layers", "--layer", help=LAYERS_HELP)] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads.")] = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an interrupted run instead of going on.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished conversion at DEST.")] = False,
    json: Json = None,
) -> None:
    """Convert a Hugging Face checkpoint to Orbax, chunk by chunk, in bounded memory.

    DEST is absent, resumable or complete: an interrupted run is continued by the same command.

    Example: dsv4 convert hf-to-orbax deepseek-ai/DeepSeek-V4-Flash ./flash-orbax --layers 0-3
    """
    # Orbax starts JAX's default backend; a conversion has no use for an accelerator.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from dsv4_convert import convert
    from dsv4_convert.errors import UsageError

    chosen = parse_layers(layers)
    if dtype not in list(convert.Storage):
        raise UsageError(f"--dtype {dtype}: expected one of {', '.join(convert.Storage)}")
    storage = convert.Storage(dtype)
    origin = fetch(source, revision=revision, layers=chosen)
    if dry_run:
        planned = convert.dry_run(origin.path, storage=storage, layers=chosen)
        _print_plan(planned)
        write_json(_as_json(planned), json)
        return
    with byte_progress("converting") as progress:
        planned, summary = convert.hf_to_orbax(
            origin.path,
            dest,
            storage=storage,
            layers=chosen,
            name=origin.repository,
            revision=origin.revision,
            workers=workers,
            restart=restart,
            overwrite=overwrite,
            announce=_print_plan,
            progress=progress,
        )
    resumed = f", {summary.resumed_leaves} leaves kept from an interrupted run" if summary.resumed_leaves else ""
    typer.echo(f"{dest}: {len(summary.records)} leaves, {size(summary.total_bytes)} written{resumed}", err=json == "-")
    document = {**_as_json(planned), "destination": str(dest), "resumed_leaves": summary.resumed_leaves}
    write_json(document, json)


def _print_plan(planned: Plan) -> None:
    """The plan in a few lines, on stderr."""

    def by_dtype(sizes: object) -> str:
        assert isinstance(sizes, dict)
        return ", ".join(f"{name} {size(nbytes)}" for name, nbytes in sorted(sizes.items()))

    lines = [
        f"reads   {planned.tensors} tensors, {size(planned.bytes_read)} ({by_dtype(planned.read)})",
        f"writes  {len(planned.pieces)} leaves, {size(planned.bytes_written)} ({by_dtype(planned.written)})",
    ]
    if planned.dropped:
        reasons = sorted(set(planned.dropped.values()))
        lines.append(f"drops   {len(planned.dropped)} tensors: {'; '.join(reasons)}")
    if planned.rounded:
        lines.append(f"rounds  {len(planned.rounded)} float32 leaves to bfloat16; --dtype float32 keeps them exact")
    typer.echo("\n".join(lines), err=True)


def _as_json(planned: Plan) -> dict[str, object]:
    return {
        "schema_version": 1,
        "dialect": planned.dialect.value,
        "storage": planned.storage.value,
        "layers": list(planned.layers),
        "tensors": planned.tensors,
        "dropped": len(planned.dropped),
        "rounded": len(planned.rounded),
        "read": dict(planned.read),
        "written": dict(planned.written),
    }
