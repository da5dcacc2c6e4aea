"""How long a conversion will take and whether the disk is large enough."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsv4_convert.checkpoint import TensorInfo
from dsv4_convert.checkpoint.dtypes import DTYPES, array_shape
from dsv4_convert.checkpoint.streamed import StreamedCheckpoint
from dsv4_convert.convert.plan import Described, Plan
from dsv4_convert.convert.shards import as_arriving
from dsv4_convert.convert.storage import Form, StoredLeaf
from dsv4_convert.errors import BadInput, ResourceError
from dsv4_convert.files.limits import free_bytes, nearest_folder
from dsv4_convert.files.workspace import require_writable
from dsv4_convert.formats.weight import decode_weight
from dsv4_convert.store import Destination, chunk_digest, open_destination

Array = np.ndarray[Any, Any]

_PROBE_BYTES = 96 << 20
#: Bytes of a conversion from which on a measurement is short beside it.
_WORTH_MEASURING = 40 * _PROBE_BYTES
_BLOCK_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Bytes per second.

    Attributes:
        read: reading the source from a cold disk; None if the source is remote.
        fetch: reading the source over the network; None if the source is local.
        make: decoding and hashing output on one core.
        write: writing to the destination, until the bytes are on the disk.
        shared: source and destination are on one device, which does one thing at a time.
        packed: compressed size of a typical chunk divided by its size; 1 if it was not measured.
        measured: the rates come from a second's work on the real source and destination; otherwise they are assumed.
    """

    read: float | None
    fetch: float | None
    make: float
    write: float
    shared: bool
    packed: float
    measured: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Time, disk, network and memory that a conversion needs.

    Attributes:
        seconds: for the whole conversion.
        limit: the bottleneck: ``disk``, ``cores`` or ``network``.
        needed_disk: bytes of the finished destination.
        free_disk: free bytes there; bytes that an interrupted run has written count as free. None for a bucket.
        to_fetch: bytes that come over the network.
        source_disk: most bytes of fetched files on disk at a time.
        source_free: free bytes on the disk of the fetched files.
        memory: upper bound of the peak, beyond the interpreter with its imports.
        workers: threads.
    """

    seconds: float
    limit: str
    needed_disk: int
    free_disk: int | None
    to_fetch: int
    source_disk: int
    source_free: int
    memory: int
    workers: int
    rates: Rates


def estimate(
    planned: Plan, source: Described, destination: str | os.PathLike[str], *, workers: int, measure: bool = True
) -> Estimate:
    """Calculate the costs of a plan.

    Args:
        planned: what is converted.
        source: where from.
        destination: where to.
        workers: threads.
        measure: try the source, a core and the destination for a second; nothing stays behind. Without it nothing is
            read or written, and the rates are those of :data:`ASSUMED`.

    Raises:
        BadInput: the source cannot be read.
        ResourceError: the destination cannot be written.
    """
    arriving = as_arriving(source)
    place = open_destination(destination)
    if not measure and place.free() is not None:
        require_writable(Path(destination))
    rates = (_measure if measure else _assume)(planned, arriving, place)
    # The surplus of edge chunks is a hole in the file, but it would be wrong to count on that.
    needed = int(planned.bytes_on_disk * rates.packed)
    shared = rates.shared and arriving is None
    reading = planned.bytes_read / rates.read if rates.read is not None else 0.0
    writing = needed / rates.write
    to_fetch = arriving.to_fetch if arriving is not None else 0
    times = {
        "disk": reading + writing if shared else max(reading, writing),
        "cores": planned.bytes_written / rates.make / min(workers, os.cpu_count() or 1),
        "network": to_fetch / rates.fetch if rates.fetch is not None else 0.0,
    }
    limit = max(times, key=lambda name: times[name])
    return Estimate(
        seconds=times[limit],
        limit=limit,
        needed_disk=needed,
        free_disk=place.free(),
        to_fetch=to_fetch,
        source_disk=arriving.most_on_disk if arriving is not None else 0,
        source_free=free_bytes(source.root),
        memory=planned.memory(workers),
        workers=workers,
        rates=rates,
    )


def worth_measuring(planned: Plan) -> bool:
    """Whether to measure before a conversion: it is long, or only a measurement tells the size on disk."""
    return planned.compression != "none" or planned.bytes_on_disk >= _WORTH_MEASURING


def check_disk(costs: Estimate, destination: str | os.PathLike[str]) -> None:
    """Refuse what cannot be written or cannot fit. Raises :class:`ResourceError` with the numbers."""
    if "://" not in str(destination) and not os.path.lexists(destination):
        require_writable(Path(destination))
    needed = costs.needed_disk + (costs.source_disk if costs.rates.shared else 0)
    if costs.free_disk is not None and needed > costs.free_disk:
        both = f", {costs.source_disk:,} of them for the source," if costs.rates.shared and costs.source_disk else ""
        raise ResourceError(
            f"{destination}: the conversion needs {needed:,} bytes{both} and {costs.free_disk:,} are free there. "
            "Make room, choose another disk or fewer --layers, --dtype source, which keeps the published size, or for "
            "a repository --discard-source."
        )
    if costs.source_disk > costs.source_free:
        raise ResourceError(
            f"the shards need {costs.source_disk:,} bytes in the Hub's cache, {costs.source_free:,} are free there. "
            "Set HF_HUB_CACHE to a larger disk, or give --discard-source."
        )


#: Bytes per second of an ordinary machine: an SSD, one core, and a network of 1 Gbit/s.
ASSUMED = {"read": 1e9, "write": 0.5e9, "make": 1e9, "fetch": 100e6}


def _assume(planned: Plan, arriving: StreamedCheckpoint | None, place: Destination) -> Rates:
    sample = next(iter(planned.infos.values()))
    return Rates(
        read=ASSUMED["read"] if arriving is None else None,
        fetch=ASSUMED["fetch"] if arriving is not None and arriving.to_fetch else None,
        make=ASSUMED["make"],
        write=ASSUMED["write"],
        shared=_on_one_device(sample, place),
        packed=1.0,
        measured=False,
    )


def _on_one_device(sample: TensorInfo, place: Destination) -> bool:
    return nearest_folder(sample.file.parent).stat().st_dev == place.device()


def _measure(planned: Plan, arriving: StreamedCheckpoint | None, place: Destination) -> Rates:
    """Convert random bytes of the most common kind of tensor, write them, and read as many of the source."""
    typical = max(planned.stored_leaves, key=lambda stored_leaf: stored_leaf.nbytes)
    make, chunk = _make_rate(planned, typical)
    count = max(1, min(64, _PROBE_BYTES // max(1, chunk.nbytes)))
    seconds, stored = place.probe(chunk, count, planned.compression)
    sample = max(planned.infos.values(), key=lambda info: info.nbytes)
    return Rates(
        read=_read_rate(sample) if arriving is None else None,
        fetch=arriving.rate() if arriving is not None and arriving.to_fetch else None,
        make=make,
        write=stored / seconds,
        shared=_on_one_device(sample, place),
        packed=stored / (count * chunk.nbytes) if planned.compression != "none" else 1.0,
        measured=True,
    )


def _make_rate(planned: Plan, stored_leaf: StoredLeaf) -> tuple[float, Array]:
    """Bytes of output per second, and a chunk as it is stored."""
    source = stored_leaf.leaf.sources[0]
    rng = np.random.default_rng(0)
    weight = _random(planned.infos[source.weight], rng, rows=stored_leaf.rows_per_chunk)
    scale = None
    if source.scale is not None:
        info = planned.infos[source.scale]
        rows = -(-stored_leaf.rows_per_chunk * info.shape[0] // planned.infos[source.weight].shape[0])
        scale = _random(info, rng, rows=rows)

    def make() -> Array:
        if stored_leaf.form is Form.DECODED:
            chunk = decode_weight(
                weight, scale, dtype=stored_leaf.dtype, block=source.block, transpose=stored_leaf.transposed
            )
        else:
            chunk = weight.copy()
        chunk_digest(chunk)
        return chunk

    make()  # loads the compiled loops
    start = time.perf_counter()
    chunk = make()
    return chunk.nbytes / max(time.perf_counter() - start, 1e-6), chunk


def _random(info: TensorInfo, rng: np.random.Generator, *, rows: int) -> Array:
    """Plausible content of a tensor's first rows: any codes, scales of a few powers of two."""
    shape = array_shape(info.dtype, info.shape)
    shape = (min(rows, shape[0]), *shape[-1:]) if len(shape) > 1 else shape
    dtype = DTYPES[info.dtype].array
    if dtype == np.dtype(ml_dtypes.float8_e8m0fnu):
        return rng.integers(118, 124, shape, np.uint8).view(dtype)
    if dtype.itemsize == 1:
        return rng.integers(0, 256, shape, np.uint8).view(dtype)
    return rng.normal(size=shape).astype(dtype)


def _read_rate(sample: TensorInfo) -> float:
    """Bytes per second of a part of the source that is not in the page cache."""
    length = min(sample.nbytes, _PROBE_BYTES)
    buffer = bytearray(_BLOCK_BYTES)
    try:
        with sample.file.open("rb", buffering=0) as stream:
            if hasattr(os, "posix_fadvise"):  # not on macOS, where what is measured may lie in the page cache
                os.posix_fadvise(stream.fileno(), sample.start, length, os.POSIX_FADV_DONTNEED)
            stream.seek(sample.start)
            start, left = time.perf_counter(), length
            while left > 0 and (count := stream.readinto(memoryview(buffer)[: min(left, _BLOCK_BYTES)])):
                left -= count
            return (length - left) / max(time.perf_counter() - start, 1e-6)
    except OSError as error:
        raise BadInput(
            f"{sample.file}: cannot be read ({error.strerror}); check its permissions and the disk"
        ) from None
