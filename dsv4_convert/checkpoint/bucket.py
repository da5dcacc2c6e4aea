"""A checkpoint in a bucket, such as ``gs://bucket/DeepSeek-V4-Flash``.

A shard is copied to a scratch folder when it is needed, and deleted there once all of it is converted; nothing in the
bucket is touched. A bucket states no SHA-256, so only sizes are compared.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from dsv4_convert.checkpoint.hub_progress import Meter
from dsv4_convert.checkpoint.index import INDEX_NAME, SHARD_SUFFIX, read_weight_map
from dsv4_convert.checkpoint.planned import SMALL_FILES, PlannedFile, needed
from dsv4_convert.checkpoint.streamed import StreamedCheckpoint
from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.files.remote import BucketFolder, RemoteFolder
from dsv4_convert.files.strict_json import MAX_JSON_BYTES
from dsv4_convert.files.writing import atomic_write

_PIECE_BYTES = 16 << 20


class BucketOrigin:
    """An :class:`~dsv4_convert.checkpoint.streamed.Origin`: a folder of a bucket, copied to scratch file by file."""

    revision: str | None = None

    def __init__(self, url: str) -> None:
        """Nothing is fetched yet. Raises :class:`UsageError`: gcsfs is not installed."""
        folder = BucketFolder(url)
        self.remote: RemoteFolder = folder
        self.name = folder.url
        self.files = folder.files()
        self.root = Path(tempfile.mkdtemp(prefix="dsv4-shards-"))

    def fetch(self, file: PlannedFile, meter: Meter, *, force: bool = False) -> Path:
        path = self.root / file.name
        if path.exists() and not force:
            return path
        with atomic_write(path, nbytes=file.size) as out:
            for start in range(0, file.size, _PIECE_BYTES):
                piece = self.remote.read(file.name, start, min(start + _PIECE_BYTES, file.size))
                out.write(piece)
                meter.add(len(piece))
        return path

    def delete(self, shard: str) -> None:
        (self.root / shard).unlink(missing_ok=True)

    def changed(self) -> Mapping[str, str]:
        return {name: key for name, (_, key) in self.files.items() if name.endswith(SHARD_SUFFIX)}

    def close(self) -> None:
        """The copies go."""
        shutil.rmtree(self.root, ignore_errors=True)


def open_bucket(url: str, *, want: Callable[[str], bool] | None = None) -> StreamedCheckpoint:
    """Open a folder of a bucket by its config, its index and the headers of its shards.

    Args:
        url: such as ``gs://bucket/model``.
        want: says of a tensor name whether the shard that holds it is needed; None for all shards.

    Raises:
        BadInput: no checkpoint, or headers that are damaged or contradict the index.
        ResourceError: the bucket cannot be reached.
        UsageError: gcsfs is not installed, or ``want`` wants nothing.
    """
    origin = BucketOrigin(url)
    try:
        there = {
            name: PlannedFile(name=name, size=size, oid=None, cached=False) for name, (size, _) in origin.files.items()
        }
        for name in SMALL_FILES:
            if name in there and there[name].size > MAX_JSON_BYTES:
                raise BadInput(f"{name}: {there[name].size:,} bytes, where at most {MAX_JSON_BYTES:,} are expected")
        weight_map = None
        if INDEX_NAME in there:
            weight_map = read_weight_map(origin.fetch(there[INDEX_NAME], Meter("download", 0, None)))
        files = [there[name] for name in needed(there, weight_map, want)]
        return StreamedCheckpoint(origin, files, weight_map=weight_map, discard=True)
    except BaseException as error:
        origin.close()
        if isinstance(error, BadInput | UsageError):
            raise type(error)(f"{origin.name}: {error}") from None
        raise
