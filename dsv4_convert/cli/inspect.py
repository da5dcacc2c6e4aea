"""``dsv4 inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from dsv4_convert.cli.common import REVISION_HELP, Json, console, reported, write_json
from dsv4_convert.cli.status import status


@reported
def inspect(
    path: Annotated[
        str,
        typer.Argument(
            help="Folder, config.json, repository such as deepseek-ai/DeepSeek-V4-Flash, gs://… for any of these, or "
            "https://… for a golden."
        ),
    ],
    revision: Annotated[str | None, typer.Option(help=REVISION_HELP)] = None,
    json: Json = None,
) -> None:
    """Show what something is: its layers in one picture, parameters and bytes by part and dtype, and anything odd.

    It reads only headers, manifests and sizes; for a Hub repository, it fetches only headers. dsv4 verify checks the
    bytes.

    Example: dsv4 inspect deepseek-ai/DeepSeek-V4-Flash

    Example: dsv4 inspect ./flash-orbax --json -
    """
    from dsv4_convert.inspection import inspect as look
    from dsv4_convert.inspection import render

    with status("inspect") as say:
        found = look(path, revision=revision, say=say)
    write_json(found.to_json(), json)
    if json != "-":
        render(found, console())
