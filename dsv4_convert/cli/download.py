"""``dsv4 download``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4_convert.cli.common import LAYERS_HELP, REVISION_HELP, Json, echo, parse_layers, resumable, write_json
from dsv4_convert.cli.status import byte_progress, status
from dsv4_convert.show.units import size

if TYPE_CHECKING:
    from dsv4_convert.checkpoint.hub_progress import Progress


@resumable
def download(
    repo: Annotated[str, typer.Argument(help="Repository, such as deepseek-ai/DeepSeek-V4-Flash.")],
    revision: Annotated[str | None, typer.Option(help=REVISION_HELP)] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", "--layer", help=LAYERS_HELP + " Only the shards that they need.")
    ] = None,
    local_dir: Annotated[Path | None, typer.Option(help="Folder to download to, instead of the Hub's cache.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be fetched, and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Download again what is on disk already.")] = False,
    json: Json = None,
) -> None:
    """Download a checkpoint from the Hub, and compare every file's hash with what the Hub states.

    HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE and HF_HUB_OFFLINE are honoured.

    Example: dsv4 download deepseek-ai/DeepSeek-V4-Flash --layers 0-3 --dry-run
    """
    from dsv4_convert.checkpoint import hub
    from dsv4_convert.checkpoint.locate import wanted_tensors

    want = wanted_tensors(parse_layers(layers))
    if dry_run:
        with status("download") as say:
            say("asking the Hub")
            plan = hub.plan_download(repo, revision=revision, want=want, local_dir=local_dir, force=force)
        files = [{"name": file.name, "size": file.size, "cached": file.cached} for file in plan.files]
        if json != "-":
            for file in plan.files:
                echo(f"{size(file.size):>10}  {'on disk  ' if file.cached else ''}{file.name}")
            total = f"{size(plan.to_download_bytes)} of {size(plan.total_bytes)}"
            echo(f"{repo} at {plan.revision}: would download {total}, {len(plan.files)} files")
        write_json({"schema_version": 1, "repository": repo, "revision": plan.revision, "files": files}, json)
        return
    with byte_progress("") as show:
        done = hub.download(
            repo, revision=revision, want=want, local_dir=local_dir, force=force, progress=_staged(show)
        )
    if json != "-":
        echo(str(done.path))
    write_json(
        {
            "schema_version": 1,
            "repository": repo,
            "revision": done.revision,
            "path": str(done.path),
            "files": list(done.files),
            "unverified": list(done.unverified),
        },
        json,
    )


def _staged(show: Callable[[int, int, str], None]) -> Progress:
    return lambda stage, done, total: show(done, total, stage)
