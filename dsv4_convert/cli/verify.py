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
    from dsv4_convert.convert.verification import verify as verified
    from dsv4_convert.errors import CheckFailed, listed

    with byte_progress("verifying") as progress:
        found = verified(checkpoint, against, progress=progress)
    problems = [*found.problems, *(found.unaccounted if strict else ())]
    for line in (*(() if strict else found.unaccounted), *found.repeated_experts):
        echo(f"warning: {line}", err=True)
    write_json(
        {
            "schema_version": 1,
            "checkpoint": without_secrets(checkpoint),
            "against": None if against is None else without_secrets(against),
            "problems": problems,
            "unaccounted": list(found.unaccounted),
            "repeated_experts": list(found.repeated_experts),
        },
        json,
    )
    if problems:
        way_out = "Remove what is not part of it." if found.passed else "Convert the model again."
        count = number_of(len(problems), "problem")
        raise CheckFailed(f"{checkpoint}: {count}:\n{listed(problems)}\n{way_out}")
    equal = "every byte as written" + ("" if against is None else f" and as {without_secrets(against)} gives it")
    echo(f"{without_secrets(checkpoint)}: {found.leaves} leaves, {size(found.nbytes)}, {equal}", err=json == "-")
