"""``dsv4 convert orbax-to-hf``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from dsv4_convert.cli.common import CHECKPOINT_HELP, Json, echo, resumable, write_json
from dsv4_convert.cli.status import byte_progress
from dsv4_convert.show.units import size


@resumable
def orbax_to_hf(
    checkpoint: Annotated[str, typer.Argument(help=CHECKPOINT_HELP)],
    dest: Annotated[Path, typer.Argument(help="Folder to create.")],
    requantize: Annotated[
        bool,
        typer.Option("--requantize", help="Quantise bfloat16 or float32 weights to their published form."),
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard an interrupted run instead of resuming it.")
    ] = False,
    json: Json = None,
) -> None:
    """Restore a Hugging Face folder from a converted checkpoint.

    From --dtype source, it restores the published tensors byte for byte, in their shards, and compares each with the
    hash that the conversion recorded. From bfloat16 or float32, it writes a folder in full precision that transformers
    loads. With --requantize, it writes the published FP8 and FP4 form and counts the values that this changes; if they
    came from that form, none change.

    Example: dsv4 convert orbax-to-hf ./flash-orbax ./flash-again
    """
    from dsv4_convert.convert.to_hf import orbax_to_hf as export

    with byte_progress("writing") as progress:
        done = export(checkpoint, dest, requantize=requantize, restart=restart, progress=progress)
    lines = [f"{dest}: {done.tensors:,} tensors, {size(done.nbytes)}, {len(done.shards)} shards"]
    if done.identical:
        lines.append(f"{done.identical:,} tensors have the bytes of the source")
    if done.quantized:
        changed = sum(done.changed.values())
        what = f"{changed:,} values in {len(done.changed)} of them changed" if changed else "no value changed"
        lines.append(f"{done.quantized:,} weights quantised again, {what}")
    lines += [f"left out: {count:,} tensors: {reason}" for reason, count in sorted(done.left_out.items())]
    for line in lines:
        echo(line, err=json == "-")
    write_json({"schema_version": 1, "destination": str(dest), **dataclasses.asdict(done)}, json)
