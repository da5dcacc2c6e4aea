"""``dsv4 doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from dsv4_convert.cli.common import Json, console, reported, write_json
from dsv4_convert.cli.status import status


@reported
def doctor(
    offline: Annotated[bool, typer.Option("--offline", help="Do not check whether the Hub can be reached.")] = False,
    json: Json = None,
) -> None:
    """Check this machine: packages and extras, devices, memory, disks, the Hub. Says what is missing for which command.

    Exits 1 if something is missing that every command needs.

    Example: dsv4 doctor

    Example: dsv4 doctor --offline --json -
    """
    from dsv4_convert.doctor import examine, render
    from dsv4_convert.errors import CheckFailed

    with status("doctor") as say:
        diagnosis = examine(offline=offline, say=say)
    write_json(diagnosis.to_json(), json)
    if json != "-":
        render(diagnosis, console())
    if not diagnosis.healthy:
        raise typer.Exit(CheckFailed.exit_code)
