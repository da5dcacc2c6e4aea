"""The plan: what it counts, what it refuses, and the memory that it promises."""

from __future__ import annotations

import collections
import shutil
from pathlib import Path

import pytest

from dsv4_convert.checkpoint import Checkpoint, open_checkpoint
from dsv4_convert.convert import Plan, Storage, check_disk, estimate, hf_to_orbax, plan
from dsv4_convert.convert.estimate import ASSUMED
from dsv4_convert.errors import ResourceError
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.spec.config import Config


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "hf"
    write_checkpoint(folder, tiny_config())
    return folder


def planned(folder: Path, storage: Storage = Storage.BFLOAT16, **options: object) -> Plan:
    with open_checkpoint(folder) as checkpoint:
        return plan(checkpoint, Config.from_hf(checkpoint.config), storage, **options)


def opened(folder: Path) -> Checkpoint:
    """A closed checkpoint: an estimate needs only its folder."""
    with open_checkpoint(folder) as checkpoint:
        return checkpoint


@pytest.mark.parametrize("storage", Storage)
def test_every_byte_of_the_source_is_planned_once(tiny: Path, storage: Storage) -> None:
    """The chunks' parts of the source add up to the tensors that are used; the bytes written are those on the disk."""
    found = planned(tiny, storage)
    parts = sum(
        found.bytes_of(stored_leaf, index)
        for stored_leaf in found.stored_leaves
        for index in stored_leaf.layout.chunk_indices()
    )
    assert found.bytes_read - len(found.stored_leaves) * 100 <= parts <= found.bytes_read
    hf_to_orbax(tiny, tiny.parent / f"orbax-{storage}", storage=storage)
    chunks = [
        file.stat().st_size
        for stored_leaf in found.stored_leaves
        for file in (tiny.parent / f"orbax-{storage}" / stored_leaf.path).iterdir()
        if file.name != ".zarray"
    ]
    assert sum(chunks) == found.bytes_on_disk


def test_more_threads_are_allowed_by_more_memory(tiny: Path) -> None:
    found = planned(tiny)
    one, two = found.memory(1), found.memory(2)
    assert found.workers(one, 8) == 1
    assert found.workers(two, 8) == 2
    assert found.workers(2 << 30, 3) == 3
    with pytest.raises(ResourceError, match=r"needs 0\.\d\d GiB beside the interpreter.*largest chunk.*--max-memory"):
        found.workers(one - 1)


def test_a_disk_that_is_too_small_is_refused_with_the_numbers(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, source = planned(tiny), opened(tiny)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, found.bytes_on_disk - 1))
    costs = estimate(found, source, tmp_path / "orbax", workers=2)
    message = f"needs {found.bytes_on_disk:,} bytes and {found.bytes_on_disk - 1:,} are free.*--dtype source"
    with pytest.raises(ResourceError, match=message):
        check_disk(costs, tmp_path / "orbax")
    # Bytes that an interrupted run has written count as free.
    kept = tmp_path / "orbax.dsv4-partial" / "leaves" / "embed"
    kept.mkdir(parents=True)
    (kept / "0.0").write_bytes(b"x")
    check_disk(estimate(found, source, tmp_path / "orbax", workers=2), tmp_path / "orbax")


@pytest.mark.parametrize("storage", Storage)
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_an_estimate_leaves_nothing_behind(tiny: Path, tmp_path: Path, storage: Storage, compression: str) -> None:
    costs = estimate(
        planned(tiny, storage, compression=compression), opened(tiny), tmp_path / "a" / "b" / "orbax", workers=2
    )
    assert not list(tmp_path.iterdir())
    assert costs.seconds > 0
    assert costs.limit in ("disk", "cores")
    assert costs.rates.shared
    assert costs.rates.read is not None
    assert (costs.rates.packed == 1.0) == (compression == "none")


def test_a_plan_without_measuring_reads_and_writes_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = shutil.copytree(tiny, tmp_path / "hf")
    found, source = planned(copied), opened(copied)
    for shard in copied.glob("*.safetensors"):  # the headers are known
        shard.write_bytes(b"")
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("something is written"))
    costs = estimate(found, source, tmp_path / "a" / "orbax", workers=2, measure=False)
    assert not costs.rates.measured
    assert costs.rates.write == ASSUMED["write"]
    assert costs.needed_disk == found.bytes_on_disk


def test_a_destination_that_cannot_be_written_is_refused_by_the_estimate(tiny: Path) -> None:
    with pytest.raises(ResourceError, match="/proc: cannot be written"):
        estimate(planned(tiny), opened(tiny), Path("/proc/orbax"), workers=2)
