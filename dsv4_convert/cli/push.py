"""``dsv4 push``."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from dsv4_convert.cli.common import Json, echo, resumable, write_json
from dsv4_convert.cli.status import status
from dsv4_convert.show.units import size


@resumable
def push(
    path: Annotated[str, typer.Argument(help="Folder of a golden, or of a checkpoint that dsv4 converted.")],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository of the Hub; made if needed.")],
    branch: Annotated[
        str | None, typer.Option("--revision", help="Existing branch to push to. Default: the default branch.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    replace_readme: Annotated[
        bool, typer.Option("--replace-readme", help="Replace the repository's README.md, which is kept otherwise.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print files and README.md; send nothing.")] = False,
    json: Json = None,
) -> None:
    """Push a golden or a converted checkpoint to the Hub: a golden to a dataset, a checkpoint to a model.

    Only the files that its manifest names are sent. A README.md with the source, its revision and how to use the data
    is added where the repository has none. Files that the repository has already are not sent again, so the same
    command goes on after an interruption. HF_ENDPOINT and HF_TOKEN are honoured; the token needs write access.

    Example: dsv4 push ./flash-golden my-org/flash-golden --dry-run

    Example: dsv4 push ./flash-orbax my-org/flash-orbax --private
    """
    from dsv4_convert.inspection.publication import publication

    with status("push") as say:
        found = publication(path, say=say)
        card = found.card(repository)
        pushed = None
        if not dry_run:
            from dsv4_convert.checkpoint import hub_push

            say(f"sending {size(found.nbytes)} to {repository}")
            pushed = hub_push.push(
                found.folder,
                list(found.files),
                card,
                hub_push.PushTarget(
                    repository=repository,
                    kind=found.kind,
                    branch=branch,
                    private=private,
                    replace_card=replace_readme,
                ),
            )
    err = json == "-"
    if pushed is None:
        for name, nbytes in found.files.items():
            echo(f"{size(nbytes):>10}  {name}", err=err)
        for line in card.splitlines():
            echo(f"  {line}", err=err)
        echo(f"would push {len(found.files):,} files, {size(found.nbytes)}, to the {found.kind} {repository}", err=err)
    else:
        kept = "" if pushed.card_written else ", whose README.md is kept; --replace-readme replaces it"
        echo(
            f"pushed {len(found.files):,} files, {size(found.nbytes)}, to the {found.kind} {repository}{kept}", err=err
        )
        echo(pushed.url, err=err)
    write_json(
        {
            "schema_version": 1,
            "repository": repository,
            "kind": found.kind,
            "files": [{"name": name, "size": nbytes} for name, nbytes in found.files.items()],
            "card": card,
            "pushed": None if pushed is None else dataclasses.asdict(pushed),
        },
        json,
    )
