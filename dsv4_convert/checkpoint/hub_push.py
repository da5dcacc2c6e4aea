"""Sending a folder to a repository of the Hub by the client's own upload, which sends what is not there yet."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants

from dsv4_convert.checkpoint.hub_errors import check_token, hub_errors

#: The page of a repository.
README = "README.md"
Kind = Literal["model", "dataset"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pushed:
    """``url``: of the commit. ``card_written``: whether README.md was written, which is kept if there is one."""

    repository: str
    kind: Kind
    commit: str
    url: str
    card_written: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushTarget:
    """Where a folder goes.

    Attributes:
        repository: ``ORG/NAME``; it is made if needed.
        kind: of repository.
        branch: an existing branch; None for the default one.
        private: whether a repository that is made is private. One that exists stays as it is.
        replace_card: whether a README.md that is there is replaced.
    """

    repository: str
    kind: Kind
    branch: str | None = None
    private: bool = False
    replace_card: bool = False


def push(folder: Path, names: list[str], card: str, target: PushTarget) -> Pushed:
    """Send files of a folder, then the card as README.md if there is none.

    Args:
        folder: where the files are.
        names: their paths in the folder, which are their paths in the repository.
        card: Markdown with a header.
        target: where they go.

    Raises:
        UsageError: not the name of a repository, or an access token that cannot be sent.
        BadInput: no access token, or one that may not write; no such branch.
        ResourceError: the Hub cannot be reached, or fails.
    """
    check_token()
    api = HfApi(library_name="dsv4", endpoint=constants.ENDPOINT)
    branch = target.branch or constants.DEFAULT_REVISION
    with hub_errors(target.repository, branch, folder, access="write"):
        made = api.create_repo(target.repository, repo_type=target.kind, private=target.private or None, exist_ok=True)
        has_card = api.file_exists(made.repo_id, README, repo_type=target.kind, revision=branch)
        sent = api.upload_folder(
            folder_path=folder,
            allow_patterns=names,
            repo_id=made.repo_id,
            repo_type=target.kind,
            revision=branch,
            commit_message=f"Upload {folder.name} with dsv4",
        )
        writes = target.replace_card or not has_card
        if writes:
            sent = api.upload_file(
                path_or_fileobj=card.encode(),
                path_in_repo=README,
                repo_id=made.repo_id,
                repo_type=target.kind,
                revision=branch,
                commit_message="Say where it comes from",
            )
    return Pushed(
        repository=made.repo_id, kind=target.kind, commit=sent.oid, url=str(sent.commit_url), card_written=writes
    )
