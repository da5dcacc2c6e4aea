"""A checkpoint in a bucket, such as ``gs://bucket/DeepSeek-V4-Flash``, through etils.epath.

It is opened by the headers of its shards. A shard is copied to a scratch folder when it is needed, and deleted there
once all of it is converted; nothing in the bucket is touched. A bucket states no SHA-256, so only sizes are compared.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv4_convert.checkpoint.arriving import TRANSFERS, ArrivingCheckpoint
from dsv4_convert.checkpoint.folder import absent_tensors
from dsv4_convert.checkpoint.header import Header, read_header_by_ranges
from dsv4_convert.checkpoint.hub_progress import Meter
from dsv4_convert.checkpoint.index import CONFIG_NAME, INDEX_NAME, SHARD_SUFFIX, read_weight_map
from dsv4_convert.checkpoint.planned import SMALL_FILES, PlannedFile
from dsv4_convert.checkpoint.strict_json import read_object
from dsv4_convert.errors import BadInput, ResourceError, UsageError, listed

_PIECE_BYTES = 16 << 20
_PROBE_BYTES = 8 << 20


class BucketCheckpoint(ArrivingCheckpoint):
    """Made by :func:`open_bucket`. Its scratch folder is removed when it is closed."""

    def __init__(
        self,
        url: str,
        place: Any,
        scratch: Path,
        headers: Sequence[Header],
        *,
        absent: frozenset[str],
        files: Sequence[PlannedFile],
        changed: Mapping[str, float],
    ) -> None:
        super().__init__(
            root=scratch,
            config=read_object(scratch / CONFIG_NAME),
            headers=headers,
            absent=absent,
            revision=None,
            files=files,
            discard=True,
        )
        self.repository = url
        self._place = place
        self._changed = changed

    def changed(self) -> Mapping[str, float]:
        return self._changed

    def rate(self) -> float:
        shards = self.shard_files[:TRANSFERS]
        start = time.perf_counter()
        with ThreadPoolExecutor(len(shards)) as pool:
            parts = pool.map(lambda shard: _read(self._place / shard.name, 0, min(shard.size, _PROBE_BYTES)), shards)
            count = sum(map(len, parts))
        return count / max(time.perf_counter() - start, 1e-6)

    def fetch_small_files(self) -> None:
        """They came when it was opened."""

    def close(self) -> None:
        super().close()
        shutil.rmtree(self.root, ignore_errors=True)

    def _fetch(self, file: PlannedFile, *, force: bool = False) -> Path:
        return _copy(self._place / file.name, self.root / file.name, self._meter)

    def _delete(self, shard: str) -> None:
        (self.root / shard).unlink(missing_ok=True)


def open_bucket(url: str, *, want: Callable[[str], bool] | None = None) -> BucketCheckpoint:
    """Open a folder of a bucket by its config, its index and the headers of its shards.

    Args:
        url: such as ``gs://bucket/model``.
        want: says of a tensor name whether the shard that holds it is needed; None for all shards.

    Raises:
        BadInput: no checkpoint, or headers that are damaged or contradict the index.
        ResourceError: the bucket cannot be reached.
        UsageError: gcsfs is not installed, or ``want`` wants nothing.
    """
    place = _place(url)
    scratch = Path(tempfile.mkdtemp(prefix="dsv4-shards-"))
    try:
        with _reaching(url):
            there = {entry.name: entry.stat() for entry in place.iterdir() if not entry.is_dir()}
        if CONFIG_NAME not in there:
            raise BadInput(f"{url}: no {CONFIG_NAME}, so not a checkpoint; check the path")
        meter = Meter("download", 0, None)
        small = [name for name in SMALL_FILES if name in there]
        for name in small:
            _copy(place / name, scratch / name, meter)
        weight_map = read_weight_map(scratch / INDEX_NAME) if INDEX_NAME in small else None
        shards = _wanted_shards(url, sorted(name for name in there if name.endswith(SHARD_SUFFIX)), weight_map, want)
        files = [PlannedFile(name=name, size=there[name].length, oid=None, cached=False) for name in shards]
        with ThreadPoolExecutor(TRANSFERS * 2) as pool:
            headers = list(pool.map(lambda file: _header(place / file.name, scratch / file.name, file.size), files))
        return BucketCheckpoint(
            url,
            place,
            scratch,
            headers,
            absent=absent_tensors(scratch, headers, weight_map),
            files=files,
            changed={name: there[name].mtime for name in shards},
        )
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _wanted_shards(
    url: str, there: Sequence[str], weight_map: Mapping[str, str] | None, want: Callable[[str], bool] | None
) -> list[str]:
    if weight_map is None:
        if len(there) != 1:
            raise BadInput(f"{url}: expected {INDEX_NAME} or one {SHARD_SUFFIX} file, found {len(there)} and no index")
        return list(there)
    shards = sorted({shard for name, shard in weight_map.items() if want is None or want(name)})
    if not shards:
        raise UsageError(f"{url}: none of the {len(weight_map)} tensors is wanted; check the layers asked for")
    if missing := [shard for shard in shards if shard not in there]:
        raise BadInput(f"{url}: {len(missing)} of {len(shards)} shards are missing:\n{listed(missing)}")
    return shards


def _place(url: str) -> Any:
    from etils import epath  # type: ignore[import-untyped]

    place = epath.Path(url)
    try:
        with _reaching(url):
            if not place.exists():
                raise BadInput(f"{url}: no such folder in the bucket; check the path and the permissions")
    except ImportError as error:
        raise UsageError(f"{url}: {error}: pip install 'dsv4-convert[gs]'") from error
    return place


def _header(there: Any, here: Path, size: int) -> Header:
    return read_header_by_ranges(here, size, lambda start, stop: _read(there, start, stop))


def _read(file: Any, start: int, stop: int) -> bytes:
    with _reaching(file), file.open("rb") as stream:
        stream.seek(start)
        return bytes(stream.read(stop - start))


def _copy(there: Any, here: Path, meter: Meter) -> Path:
    """Copy a file to the scratch folder; it has its name only when it is whole."""
    partial = here.with_name(here.name + ".partial")
    with _reaching(there), there.open("rb") as stream, partial.open("wb") as out:
        while piece := stream.read(_PIECE_BYTES):
            out.write(piece)
            meter.add(len(piece))
    partial.rename(here)
    return here


@contextmanager
def _reaching(what: object) -> Iterator[None]:
    """Turn what the bucket's library raises into a :class:`ResourceError`."""
    try:
        yield
    except OSError as error:
        raise ResourceError(f"{what}: cannot be read: {error}. Run the same command again to go on.") from error
