"""``dsv4 verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsv4_convert.cli.common import Json, byte_progress, reported, size, write_json


@reported
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="Orbax checkpoint that dsv4 wrote.")],
    json: Json = None,
) -> None:
    """Hash every stored byte of a converted checkpoint again and compare with its manifest.

    Orbax itself restores flipped bits in silence. Exits 1 if anything differs.
    """
    from dsv4_convert.errors import CheckFailed, listed
    from dsv4_convert.store import open_store
    from dsv4_convert.store import verify as verify_store

    store = open_store(checkpoint)
    with byte_progress("verifying") as progress:
        problems = verify_store(store, progress)
    write_json({"schema_version": 1, "checkpoint": str(checkpoint), "problems": problems}, json)
    if problems:
        raise CheckFailed(f"{checkpoint}: {len(problems)} problem(s):\n{listed(problems)}\nConvert the model again.")
    total = sum(store.leaf(path).nbytes for path in store.paths)
    typer.echo(f"{checkpoint}: {len(store.paths)} leaves, {size(total)}, every byte as written", err=json == "-")
