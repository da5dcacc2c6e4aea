"""``dsv4 convert hf-to-orbax``."""

from __future__ import annotations

import dataclasses
import os
import textwrap
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv4_convert.cli.common import (
    LAYERS_HELP,
    REVISION_HELP,
    SOURCES,
    Coordinator,
    Json,
    NumProcesses,
    ProcessId,
    check_json,
    console,
    echo,
    join_processes,
    one_of,
    parse_bytes,
    parse_choice,
    parse_layers,
    resumable,
    write_json,
)
from dsv4_convert.cli.progress import conversion_progress
from dsv4_convert.cli.status import status
from dsv4_convert.show.units import duration, size

if TYPE_CHECKING:
    from dsv4_convert.checkpoint import Checkpoint
    from dsv4_convert.convert import Estimate, Plan


@resumable
def hf_to_orbax(
    source: Annotated[str, typer.Argument(help=f"Published checkpoint: {SOURCES}")],
    dest: Annotated[str, typer.Argument(help="Folder to create, or gs://bucket/path.")],
    dtype: Annotated[
        str,
        typer.Option(
            **one_of("bfloat16", "float32", "source"),
            help="How weights are stored. bfloat16 is exact for FP4 and FP8 weights with power-of-two scales; "
            "source keeps the published bytes and scales.",
        ),
    ] = "bfloat16",
    layers: Annotated[str | None, typer.Option("--layers", "--layer", help=LAYERS_HELP)] = None,
    layout: Annotated[
        str,
        typer.Option(
            **one_of("dsv4", "maxtext", "maxtext-unscanned"),
            help="Parameter tree: dsv4's own, or MaxText's with or without scan_layers.",
        ),
    ] = "dsv4",
    compression: Annotated[
        str,
        typer.Option(
            **one_of("none", "zstd"),
            help="zstd stores less than half of the bytes of FP4 weights in bfloat16, at less than a third of the "
            "speed; --dtype source is smaller and faster than that.",
        ),
    ] = "none",
    max_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory beside the interpreter, such as 800MiB or 4GiB.")
    ] = "2GiB",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Number of threads. Default: two more than there are cores, if the memory allows."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION_HELP)] = None,
    discard_source: Annotated[
        bool,
        typer.Option(
            "--discard-source",
            help="For a Hub repository: delete each shard that this conversion fetched once all of it is converted. "
            "Shards that were in the cache before stay.",
        ),
    ] = False,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop. It reads only headers and writes nothing.")
    ] = False,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="With --dry-run: measure the speed of source, processor and DEST's disk for a second, with up to "
            "96 MB, instead of assuming it.",
        ),
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard an interrupted run instead of resuming it.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished conversion at DEST.")] = False,
    json: Json = None,
) -> None:
    """Convert a Hugging Face checkpoint to Orbax, chunk by chunk, in bounded memory.

    It first prints the plan: reads, writes, tensors left out, memory, disk and time. A conversion that cannot fit is
    refused before it writes anything. DEST is absent, resumable or complete; the same command resumes an interrupted
    run.

    For a Hub repository, the plan reads only the headers. The conversion then fetches shards while it converts earlier
    ones, and compares their hashes with the Hub's.

    Several machines with a common file system share the work if each runs the same command with its own --process-id.
    Process 0 reports.

    Example: dsv4 convert hf-to-orbax deepseek-ai/DeepSeek-V4-Flash ./flash-orbax --layers 0-3
    """
    from dsv4_convert.files.limits import TO_CONVERT, require_address_space

    require_address_space(TO_CONVERT)
    # For jax.distributed. A conversion has no use for an accelerator, whatever the environment says.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from dsv4_convert import convert
    from dsv4_convert.checkpoint.locate import open_source
    from dsv4_convert.errors import UsageError
    from dsv4_convert.store import open_destination

    chosen = parse_layers(layers)
    storage = convert.Storage(parse_choice("--dtype", dtype, convert.Storage))
    tree = convert.Layout(parse_choice("--layout", layout, convert.Layout))
    packing = parse_choice("--compression", compression, ("none", "zstd"))
    options = convert.ConversionOptions(
        max_memory=parse_bytes("--max-memory", max_memory), workers=workers, restart=restart, overwrite=overwrite
    )
    processes = join_processes(coordinator, num_processes, process_id)
    if discard_source and processes.count > 1:
        raise UsageError("--discard-source: a shard is used by several processes; leave one of the two out")
    with processes.together(), ExitStack() as held:
        if processes.first and coordinator is not None:
            check_json(json)
        if processes.first and not dry_run:
            open_destination(dest).check(overwrite=overwrite)
        document: dict[str, object] = {}
        with status("plan") as say:
            say("reading headers")
            opened = open_source(source, revision=revision, layers=chosen, discard=discard_source)
            checkpoint = held.enter_context(opened)
            config = checkpoint.architecture()
            say("every tensor and where it goes")
            planned = convert.plan(checkpoint, config, storage, layers=chosen, layout=tree, compression=packing)
            threads = planned.workers(options.max_memory, options.workers)
            say("memory, disk and time")
            costs = None
            if processes.first:
                trying = measure or (not dry_run and convert.worth_measuring(planned))
                costs = convert.estimate(planned, checkpoint, dest, workers=threads, measure=trying)
        maxtext = _for_maxtext(planned, dest)
        if costs is not None:
            _print_plan(checkpoint, planned, costs)
            document = {**_as_json(planned, costs), "maxtext": maxtext}
            if dry_run:
                write_json(document, json)
            convert.check_disk(costs, dest)
        if dry_run:
            return
        with conversion_progress() as progress:
            summary = convert.carry_out(planned, checkpoint, dest, options, processes=processes, progress=progress)
    if not processes.first:
        return
    kept = f", {size(summary.kept_bytes)} of them by an interrupted run" if summary.kept_bytes else ""
    echo(f"{dest}: {len(summary.records)} leaves, {size(summary.total_bytes)} written{kept}", err=json == "-")
    echo(convert.describe_rounding(planned, summary.side_records), err=json == "-")
    if maxtext is not None:
        echo(f"MaxText trains from it by this line, whose flags are in {maxtext['file']}, too:", err=json == "-")
        echo(maxtext["command"], err=json == "-")
    write_json({**document, "destination": str(dest), "kept_bytes": summary.kept_bytes}, json)


def _print_plan(checkpoint: Checkpoint, planned: Plan, costs: Estimate) -> None:
    """The plan in a few lines, on stderr."""

    def by_dtype(sizes: Any) -> str:
        return ", ".join(f"{name} {size(nbytes)}" for name, nbytes in sorted(sizes.items()))

    from dsv4_convert.convert import Layout
    from dsv4_convert.spec import maxtext_config

    rates = costs.rates
    at = f" at {checkpoint.revision}" if checkpoint.revision is not None else ""
    lines = [
        f"source  {checkpoint.repository or checkpoint.root}{at}, {len(checkpoint.shards)} shards, "
        f"{planned.dialect} names",
        f"reads   {planned.tensors:,} tensors, {size(planned.bytes_read)} ({by_dtype(planned.read)})",
        f"writes  {len(planned.stored_leaves):,} leaves, {size(planned.bytes_written)} ({by_dtype(planned.written)})",
    ]
    reasons: dict[str, int] = {}
    for reason in planned.dropped.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    lines += [f"drops   {count:,} tensors: {reason}" for reason, count in sorted(reasons.items())]
    if planned.layout is not Layout.DSV4:
        lines.append(f"warns   {maxtext_config.warning(planned.config)}")
    if planned.inexact:
        lines.append(f"rounds  {len(planned.inexact):,} leaves to bfloat16; --dtype float32 keeps them exact")
    if costs.to_fetch:
        lines.append(f"fetches {size(costs.to_fetch)}, of which at most {size(costs.source_disk)} on disk at a time")
    packed = f", at {rates.packed:.2f} of their size" if planned.compression != "none" else ""
    lines += [
        f"disk    {size(costs.needed_disk)} needed{packed}"
        + (f", {size(costs.free_disk)} free" if costs.free_disk is not None else " in the bucket"),
        f"memory  at most {costs.memory / 2**30:.1f} GiB beside the interpreter, {costs.workers} threads",
        f"time    about {duration(costs.seconds)}, which the {costs.limit} "
        f"decide{'' if costs.limit == 'cores' else 's'} ({_speeds(costs)})",
    ]
    width = min(80, max(console(err=True).width, 40))
    for part in (part for line in lines for part in textwrap.wrap(line, width, subsequent_indent=" " * 8)):
        echo(part, err=True)


def _for_maxtext(planned: Plan, dest: str) -> dict[str, Any] | None:
    """Tell a user of MaxText how to load the converted tree."""
    from dsv4_convert.convert import Layout
    from dsv4_convert.spec import maxtext_config
    from dsv4_convert.store import as_path

    if planned.layout is Layout.DSV4:
        return None
    place = as_path(dest)
    scanned = planned.layout is Layout.MAXTEXT
    return {
        "file": str(place / maxtext_config.FILE),
        "command": maxtext_config.command(planned.config, str(place), scanned=scanned),
        "differences": maxtext_config.differences(planned.config),
    }


def _speeds(costs: Estimate) -> str:
    rates = costs.rates
    reading = f"reads {size(rates.read)}/s, " if rates.read is not None else ""
    fetching = f"fetches {size(rates.fetch)}/s, " if rates.fetch is not None else ""
    assumed = "" if rates.measured else "; assumed"
    return f"{fetching}{reading}converts {size(rates.make)}/s on a core, writes {size(rates.write)}/s{assumed}"


def _as_json(planned: Plan, costs: Estimate) -> dict[str, object]:
    return {
        "schema_version": 1,
        "dialect": planned.dialect.value,
        "storage": planned.storage.value,
        "layout": planned.layout.value,
        "compression": planned.compression,
        "layers": list(planned.layers),
        "tensors": planned.tensors,
        "dropped": len(planned.dropped),
        "inexact": len(planned.inexact),
        "read": dict(planned.read),
        "written": dict(planned.written),
        "estimate": dataclasses.asdict(costs),
    }
