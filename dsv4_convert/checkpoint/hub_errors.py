"""The Hub client's errors in our words: what went wrong, and the way out. No access token is ever in a message."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    XetDownloadError,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # of the client: httpx2 in huggingface_hub 2

from dsv4_convert.checkpoint.hub_health import endpoint
from dsv4_convert.errors import BadInput, Dsv4Error, ResourceError, UsageError
from dsv4_convert.files.remote import misconfigured
from dsv4_convert.files.strict_json import shown
from dsv4_convert.show.urls import without_secrets


class _WithoutSecrets(logging.Filter):
    """Lets all messages through, without the signatures of the URLs in them."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_secrets(record.getMessage()), None
        return True


# The client warns of transfers that break by the signed URLs of the servers that large files come from.
for _name in ("huggingface_hub.file_download", "huggingface_hub.utils._http"):
    logging.getLogger(_name).addFilter(_WithoutSecrets())

#: A permission of the access token.
Access = Literal["read", "write"]


@contextmanager
def hub_errors(repo_id: str, revision: str, folder: Path | None = None, *, access: Access = "read") -> Iterator[None]:
    """Turn what the client raises inside the block into an error of ours; ``folder`` is where it writes, or reads.

    Raises:
        BadInput: the repository, revision or file does not exist, or may not be read.
        ResourceError: network, Hub or disk fail.
        UsageError: not the name of a repository, or a proxy or endpoint that the client cannot use.
    """
    try:
        yield
    except Exception as error:
        if _quotes_a_header(error):
            raise unusable_token() from None
        ours = _translated(error, repo_id, revision, folder, access)
        if ours is None:
            raise
        raise ours from error


def check_token() -> None:
    """Refuse an access token that no HTTP header can carry, before a library quotes it in its own error.

    Raises:
        UsageError: the token that the client finds (HF_TOKEN, or a login) has illegal characters.
    """
    used = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    if used is not None and re.fullmatch(r"[!-~]+", used) is None:
        raise unusable_token()


def unusable_token() -> UsageError:
    """The error for a token with illegal characters. It does not quote the token."""
    return UsageError("the access token has characters that cannot be sent (a line end?); set HF_TOKEN again")


def unlike_the_hub(what: str, expected: str, found: object) -> BadInput:
    """The error for an answer that the Hub does not give: who answered, and what was expected of ``what``."""
    return BadInput(
        f"{endpoint()} does not answer like the Hub: {what}: expected {expected}, found {shown(str(found))}; check "
        "HF_ENDPOINT, and what is between here and there"
    )


def _quotes_a_header(error: BaseException | None) -> bool:
    """Whether a header could not be sent. The text says which, and the one with the token is the only candidate."""
    while error is not None and not isinstance(error, httpx.LocalProtocolError):
        error = error.__cause__ or error.__context__
    return error is not None


def _translated(
    error: BaseException, repo_id: str, revision: str, folder: Path | None, access: Access
) -> Dsv4Error | None:
    """The error in our words; None for what the client does not raise on purpose."""
    token_help = f"set HF_TOKEN to a token with {access} access to it, or run `hf auth login`"
    what = f"{repo_id} at {revision}"
    if (reason := misconfigured(error)) is not None:
        return UsageError(f"{what}: {reason}; set it right, and run the same command again")
    match error:
        case HFValidationError():
            return UsageError(f"{repo_id!r} is not a repository name; expected ORG/NAME, or a folder that exists")
        case GatedRepoError():
            page = f"{endpoint()}/{repo_id}"
            return BadInput(f"{repo_id}: access is gated; accept its terms at {page}, then {token_help}")
        case RepositoryNotFoundError():
            return BadInput(f"{repo_id}: no such repository, or a private one; check the name, or {token_help}")
        case RevisionNotFoundError():
            return BadInput(f"{repo_id}: no revision {revision!r}; give a branch, a tag or a commit of the repository")
        case RemoteEntryNotFoundError():
            path = error.request.url.path.partition("/resolve/")[2].partition("/")[2]
            return BadInput(f"{what}: the Hub lists the file {path!r} but does not have it; try another revision")
        case HfHubHTTPError():
            return _translated_status(error.response.status_code, repo_id, what, token_help)
        case OfflineModeIsEnabled():
            return ResourceError(f"{what}: not in the cache, and the Hub is off limits; unset HF_HUB_OFFLINE once")
        case LocalEntryNotFoundError() | RevisionResolutionError() | ValueError() if error.__cause__ is not None:
            return _translated(
                error.__cause__, repo_id, revision, folder, access
            )  # what kept the client from asking the Hub
        case RuntimeError() if error.__cause__ is not None:  # a file that could not be sent
            return _translated(error.__cause__, repo_id, revision, folder, access)
        case FileMetadataError():
            return unlike_the_hub(what, "the size and the hash of a file", "an answer without them")
        case httpx.HTTPError():
            # Only connection errors carry a text that is safe to show: the system's.
            reason = str(error) if isinstance(error, httpx.ConnectError) else type(error).__name__
            return ResourceError(
                f"{what}: {endpoint()} cannot be reached ({reason}); check network, proxy and HF_ENDPOINT, "
                "then run the same command again: finished files are kept"
            )
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return ResourceError(
                f"{what}: {_written(error) or folder}: {error.strerror}; make room, or choose another folder or "
                "HF_HUB_CACHE, and run the same command again: finished files are kept"
            )
        case OSError(strerror=str(reason)) if _written(error) is not None or folder is not None:
            return ResourceError(
                f"{what}: {_written(error) or folder}: {reason}; check its permissions and the disk, or choose another "
                "folder, and run the same command again: finished files are kept"
            )
        case OSError() | EntryNotFoundError() | RevisionResolutionError() | XetDownloadError():
            return ResourceError(
                f"{what}: the transfer failed ({type(error).__name__}); run the same command again: finished files "
                "are kept"
            )
        case _:
            return None


def _written(error: OSError) -> str | None:
    """The file that could not be written: of a copy the second."""
    return error.filename2 or error.filename


def _translated_status(status: int, repo_id: str, what: str, token_help: str) -> Dsv4Error:
    if status == 401:
        return BadInput(f"{repo_id}: the Hub does not accept the access token (HTTP 401); {token_help}")
    if status == 403:
        return BadInput(f"{repo_id}: the Hub refuses access (HTTP 403); {token_help}")
    if status == 429:
        return ResourceError(f"{what}: the Hub asks to slow down (HTTP 429); try again in some minutes")
    if status >= 500:
        return ResourceError(f"{what}: the Hub fails (HTTP {status}); run the same command again later")
    return BadInput(f"{what}: the Hub does not accept the request (HTTP {status}); check repository and revision")
