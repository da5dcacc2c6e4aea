"""``dsv4 verify``."""

from __future__ import annotations

from typing import Annotated

import typer

from dsv4_convert.cli.common import CHECKPOINT_HELP, SOURCES, Json, echo, reported, write_json
from dsv4_convert.cli.status import byte_progress
from dsv4_convert.show.units import number_of, size
from dsv4_convert.show.urls import without_secrets


@reported
def verify(
    checkpoint: Annotated[str, typer.Argument(help=CHECKPOINT_HELP)],
    against: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help=f"Source of the conversion, to decode again and compare bits: {SOURCES}"),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail, too, for anything in the folder that the manifest does not name.")
    ] = False,
    json: Json = None,
) -> None:
    """Hash every stored byte of a converted checkpoint again and compare with its manifest.

    Orbax itself restores flipped bits without a warning. --against decodes the source again and compares every stored
    byte with the result. Exits 1 if anything differs. Other files in the folder are a warning, since
    Orbax and other readers may take them for a part of the model; with --strict they are a failure.

    Example: dsv4 verify ./flash-orbax --against ./DeepSeek-V4-Flash
    """
    from dsv4_convert.convert.against import compare_with_source
    from dsv4_convert.errors import CheckFailed, listed
    from dsv4_convert.inspect.tables import repeated_experts
    from dsv4_convert.store import open_store, unaccounted
    from dsv4_convert.store import verify as verify_store

    store = open_store(checkpoint)
    with byte_progress("verifying") as progress:
        problems = verify_store(store, progress)
    if against is not None:
        with byte_progress("comparing") as progress:
            problems += compare_with_source(store, against, progress)
    beside = unaccounted(store)
    if strict:
        problems += beside
    tables = [] if problems else repeated_experts(store)
    for line in (*(() if strict else beside), *tables):
        echo(f"warning: {line}", err=True)
    write_json(
        {
            "schema_version": 1,
            "checkpoint": without_secrets(checkpoint),
            "against": None if against is None else without_secrets(against),
            "problems": problems,
            "unaccounted": beside,
            "repeated_experts": tables,
        },
        json,
    )
    if problems:
        way_out = "Remove what is not part of it." if problems == beside else "Convert the model again."
        count = number_of(len(problems), "problem")
        raise CheckFailed(f"{checkpoint}: {count}:\n{listed(problems)}\n{way_out}")
    total = sum(store.leaf(path).nbytes for path in store.paths)
    equal = "every byte as written" + ("" if against is None else f" and as {without_secrets(against)} gives it")
    echo(f"{without_secrets(checkpoint)}: {len(store.paths)} leaves, {size(total)}, {equal}", err=json == "-")
