"""The headers of a repository's shards, read by range requests: what a plan needs, without a weight."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # re-exported, but not marked as such
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
    httpx,
)

from dsv4_convert.checkpoint.header import Header, read_header, read_header_by_ranges
from dsv4_convert.checkpoint.hub_errors import hub_errors
from dsv4_convert.checkpoint.hub_plan import DownloadPlan
from dsv4_convert.checkpoint.planned import PlannedFile
from dsv4_convert.errors import ResourceError

_REQUESTS = 8
#: How often a range is asked for whose connection breaks or stalls half-way.
_TRIES = 4


class Ranges:
    """Reads ranges of the files of one repository at one commit, with the Hub client's own session."""

    def __init__(self, plan: DownloadPlan) -> None:
        self._plan = plan

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes ``start:stop`` of a file; fewer only where it ends before.

        Raises:
            BadInput, ResourceError: the Hub does not give them.
        """
        for _ in range(_TRIES - 1):
            content = self._once(name, start, stop)
            if isinstance(content, bytes):
                return content
        content = self._once(name, start, stop)
        if isinstance(content, bytes):
            return content
        with hub_errors(self._plan.repo_id, self._plan.revision):
            raise content

    def _once(self, name: str, start: int, stop: int) -> bytes | httpx.TransportError:
        """One try; what broke the connection while the bytes came."""
        headers = build_hf_headers(library_name="dsv4")
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        url = hf_hub_url(self._plan.repo_id, name, revision=self._plan.revision)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with (
            hub_errors(self._plan.repo_id, self._plan.revision),
            http_stream_backoff("GET", url, headers=headers, follow_redirects=True, timeout=timeout) as response,
        ):
            hf_raise_for_status(response)
            # A server that does not know ranges sends all of the file: leave when there is enough.
            skip = start if response.status_code == 200 else 0
            parts, length = [], 0
            try:
                for part in response.iter_raw():
                    parts.append(part)
                    length += len(part)
                    if length >= skip + stop - start:
                        break
            except httpx.TransportError as error:  # the client can begin a request anew, but not this block
                return error
        return b"".join(parts)[skip : skip + stop - start]


def read_headers(plan: DownloadPlan, shards: Sequence[PlannedFile]) -> list[Header]:
    """The headers of these shards: from the disk where they are there already, else from the Hub.

    Raises:
        BadInput: a header is damaged, or the Hub refuses it.
        ResourceError: the Hub cannot be reached.
    """
    ranges = Ranges(plan)

    def header(shard: PlannedFile) -> Header:
        file = plan.folder / shard.name
        if shard.cached and file.is_file():
            return read_header(file)
        return read_header_by_ranges(file, shard.size, lambda start, stop: ranges.read(shard.name, start, stop))

    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(header, shards))


def measured_rate(plan: DownloadPlan, shards: Sequence[PlannedFile], *, nbytes: int) -> float:
    """Bytes per second that the Hub sends of these shards at once, ``nbytes`` of each.

    Raises:
        ResourceError: nothing came.
    """
    ranges = Ranges(plan)
    start = time.perf_counter()
    with ThreadPoolExecutor(max(1, len(shards))) as pool:
        count = sum(map(len, pool.map(lambda shard: ranges.read(shard.name, 0, min(shard.size, nbytes)), shards)))
    if not count:
        raise ResourceError(f"{plan.repo_id}: the Hub sent nothing; try again later")
    return count / max(time.perf_counter() - start, 1e-6)
