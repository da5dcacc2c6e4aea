"""A Hub repository at one commit as a remote folder: what the Hub says of it, and its files by ranges.

Requests go through the session of the Hub client with the client's own headers, so HF_ENDPOINT, HF_TOKEN, proxies and
HF_HUB_OFFLINE mean what they mean everywhere. Answers are read here: the client reads them without a bound, follows a
listing to any host with the access token, and takes their form for granted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, httpx  # type: ignore[attr-defined]

from dsv4_convert.checkpoint.hub_errors import hub_errors, unlike_the_hub
from dsv4_convert.checkpoint.index import SHARD_SUFFIX
from dsv4_convert.checkpoint.planned import SMALL_FILES, PlannedFile
from dsv4_convert.checkpoint.provenance import is_commit, is_oid
from dsv4_convert.errors import BadInput, Dsv4Error, UsageError
from dsv4_convert.files.reading import foreign_content
from dsv4_convert.files.remote import HttpFolder, HttpStatus, Refused
from dsv4_convert.files.strict_json import parse_value

#: The Hub has a thousand files on a page, in about 300 KB.
_PAGES, _PAGE_BYTES = 100, 16 << 20
_KINDS = {"": "", "models": "", "datasets": "datasets/", "spaces": "spaces/"}
_URL = re.compile(r"hf://(?:(models|datasets|spaces)/)?([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?")
_BY_CODE: Mapping[str, type[HfHubHTTPError]] = {
    "GatedRepo": GatedRepoError,
    "RepoNotFound": RepositoryNotFoundError,
    "RevisionNotFound": RevisionNotFoundError,
    "EntryNotFound": RemoteEntryNotFoundError,
}


class HubFolder(HttpFolder):
    """The files of a repository at a commit or another revision."""

    def __init__(self, repo_id: str, revision: str, *, kind: str = "", inside: str = "") -> None:
        """
        Args:
            repo_id: ``ORG/NAME``.
            revision: a commit, branch or tag.
            kind: empty for models, ``datasets/`` or ``spaces/``.
            inside: a folder of the repository.
        """
        self.repo_id, self.revision = repo_id, revision
        name = f"/{kind}{repo_id}/resolve/{quote(revision, safe='')}/{quote(inside)}"
        super().__init__(f"{constants.ENDPOINT}{name}".rstrip("/"))

    @classmethod
    def of_url(cls, url: str) -> HubFolder:
        """The folder of ``hf://[datasets/]ORG/NAME[@REVISION][/FOLDER]``. Raises :class:`UsageError`: no such URL."""
        if (match := _URL.fullmatch(url)) is None:
            raise UsageError(f"{url}: expected hf://ORG/NAME, hf://datasets/ORG/NAME or such, and a folder in it")
        kind, repo_id, revision, inside = match.groups()
        folder = cls(repo_id, revision or constants.DEFAULT_REVISION, kind=_KINDS[kind or ""], inside=inside or "")
        folder.url = url
        return folder

    def commit(self) -> str:
        """The commit of the revision, 40 hex digits.

        Raises:
            BadInput: no such repository or revision, it may not be read, or the Hub does not answer like the Hub.
            ResourceError: the Hub cannot be asked.
        """
        what = f"the model info of {self.repo_id}"
        info, _ = self._api(f"models/{self.repo_id}/revision/{quote(self.revision, safe='')}?expand=sha", what)
        sha = info.get("sha") if isinstance(info, dict) else info
        if not isinstance(sha, str) or not is_commit(sha):
            raise unlike_the_hub(what, "the hash of a commit as `sha` of an object", sha)
        return sha

    def files(self) -> dict[str, PlannedFile]:
        """The files at the top of the repository. Raises as :meth:`commit`."""
        what = f"the listing of {self.repo_id}"
        found: dict[str, PlannedFile] = {}
        names: set[str] = set()
        for entry in self._listing(what):
            if (file := _file(entry, what)) is None:
                continue
            folded = file.name.casefold()
            if folded in names and (folded in SMALL_FILES or folded.endswith(SHARD_SUFFIX)):
                raise unlike_the_hub(what, "names that differ by more than case", file.name)
            names.add(folded)
            found[file.name] = file
        return found

    def _listing(self, what: str) -> Iterator[object]:
        url = f"models/{self.repo_id}/tree/{quote(self.revision, safe='')}"
        for _ in range(_PAGES):
            page, following = self._api(url, what)
            if not isinstance(page, list):
                raise unlike_the_hub(what, "a list", page)
            yield from page
            if following is None:
                return
            url = following
        raise unlike_the_hub(what, f"at most {_PAGES} pages", "one more")

    def _api(self, at: str, what: str) -> tuple[Any, str | None]:
        """An answer of the Hub, and the next page's URL. ``at`` is below ``/api/``, or such a URL.

        The access token goes with every request, so one to another server is refused before it is made.
        """
        base = httpx.URL(f"{constants.ENDPOINT}/api/")
        try:
            url = base.join(at)
        except httpx.InvalidURL:
            raise unlike_the_hub(what, "a URL of the next page", at) from None
        if (url.scheme, url.host, url.port) != (base.scheme, base.host, base.port):
            raise unlike_the_hub(what, "the next page on the same server, which gets the access token", url.host)
        try:
            answer = self._persistently(what, lambda told: self._get(str(url), told, limit=_PAGE_BYTES + 1))
        except FileNotFoundError:
            raise unlike_the_hub(what, "an answer", "none") from None
        if len(answer.content) > _PAGE_BYTES:
            raise unlike_the_hub(what, f"at most {_PAGE_BYTES:,} bytes", "more")
        try:
            return parse_value(answer.content, where=what, infinite=True), answer.following
        except BadInput:
            found = foreign_content(answer.content[:512]) or answer.content[:80].decode(errors="replace")
            raise unlike_the_hub(what, "JSON", found) from None

    def _session(self) -> Any:
        return get_session()

    def _headers(self) -> dict[str, str]:
        return build_hf_headers(library_name="dsv4")

    def _is_absent(self, response: Any) -> bool:
        return bool(response.headers.get("X-Error-Code") == "EntryNotFound")

    def _passes(self, error: Exception) -> bool:
        return not isinstance(error, OfflineModeIsEnabled) and super()._passes(error)

    def _explained(self, name: str, error: Exception) -> Dsv4Error | None:
        offline = isinstance(error, OfflineModeIsEnabled)  # which is a ConnectionError
        if isinstance(error, Refused | ConnectionError | TimeoutError) and not offline:
            return super()._explained(name, error)
        if isinstance(error, HttpStatus):
            kind = _BY_CODE.get(error.response.headers.get("X-Error-Code", ""), HfHubHTTPError)
            error = kind(str(error), response=error.response)
        try:
            with hub_errors(self.repo_id, self.revision):
                raise error
        except Dsv4Error as explained:
            return explained
        except Exception:
            return super()._explained(name, error)


def _file(entry: object, what: str) -> PlannedFile | None:
    """One entry of a listing; None for what is not a file."""
    match entry:
        case {"type": "file", "path": str(name), "size": int(size), "oid": str(oid), **rest}:
            lfs = rest.get("lfs", {"oid": oid})
            stated = lfs.get("oid") if isinstance(lfs, dict) else lfs
            if type(size) is int and size >= 0 and isinstance(stated, str) and is_oid(stated):
                return PlannedFile(name=name, size=size, oid=stated, cached=False)
        case {"type": str(kind), "path": str()} if kind != "file":
            return None
    raise unlike_the_hub(what, "entries with type, path, size, a hash as `oid`, and one in `lfs` if it is there", entry)
