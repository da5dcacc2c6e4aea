"""Run by test_sharded_restore.py in separate processes: ``python -m tests.weights.sharded PART FOLDER …``."""

from __future__ import annotations

import argparse
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dsv4_convert import Storage, Weights, restore_model
from dsv4_convert.aot.program import Job
from dsv4_convert.aot.program import weights as compiled_weights
from dsv4_convert.errors import ResourceError, UsageError
from dsv4_convert.model.axes import partition
from dsv4_convert.model.encoded import Encoded, partitions
from dsv4_convert.model.mesh import make_mesh, parse_mesh
from dsv4_convert.spec.segments import segments
from dsv4_convert.store import Store, open_store
from dsv4_convert.store.arrays import StoredArray
from dsv4_convert.store.layout import nested
from dsv4_convert.store.orbax_processes import join
from dsv4_convert.weights import restore

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


def leaves(model: Any) -> dict[tuple[Any, ...], Any]:
    """The variables of a model by their keys."""
    return dict(nnx.to_flat_state(nnx.state(model)))


def every_leaf(folder: Path) -> None:
    """On 8 devices: every leaf is that of the plain restore, laid out by its axes, from every storage."""
    sizes = parse_mesh("fsdp=2,expert=2,tensor=2")
    mesh = make_mesh(sizes, jax.devices())
    for storage in Storage:
        weights = Weights.open(folder / storage)
        for dtype in (FLOAT32, BFLOAT16)[: 1 + (storage is Storage.SOURCE)]:
            plain = leaves(restore_model(weights, drafts=True, dtype=dtype))
            listed = leaves(restore_model(weights, drafts=True, dtype=dtype, mesh=mesh))
            scanned = leaves(restore_model(weights, drafts=True, dtype=dtype, mesh=mesh, scanned=True))
            here = leaves(restore_model(weights, drafts=True, dtype=dtype, scanned=True))
            assert listed.keys() == plain.keys()
            assert scanned.keys() == here.keys() != plain.keys()
            stacks = 0
            for key, variable in (*listed.items(), *scanned.items()):
                found, value = variable.get_value(), plain.get(key)
                if value is not None:
                    expected = np.asarray(value.get_value())
                else:
                    _, _, segment, place, *rest = key
                    layers = segments(weights.config)[segment].layers(place)
                    expected = np.stack([np.asarray(plain["layers", layer, *rest].get_value()) for layer in layers])
                    assert np.array_equal(np.asarray(here[key].get_value()), expected), key
                    stacks += len(layers) > 1
                assert found.dtype == expected.dtype, key
                assert np.array_equal(np.asarray(found), expected), key
                spec = partition(variable.axes, expected.shape, sizes, what=str(key))
                assert found.sharding == NamedSharding(mesh, spec), key
                if "tid2eid" in key or "norm" in key:
                    assert found.sharding.is_fully_replicated, key
                elif "experts" in key:
                    inner = ("fsdp", "tensor") if key[-1] != "w2" else ("tensor", "fsdp")
                    assert found.sharding.spec == PartitionSpec(*[None] * (found.ndim - 3), "expert", *inner), key
                    assert {shard.data.size for shard in found.addressable_shards} == {found.size // 8}, key
            assert stacks, "no layers are stacked"
    with pytest.raises(UsageError, match=r"experts\.w1: its axis experts has 6, which the mesh axes expert=4 do not"):
        restore_model(weights, mesh=make_mesh({"expert": 4, "tensor": 2}, jax.devices()))
    whole = leaves(restore_model(weights, mesh=mesh)).values()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", lambda self: "MemAvailable:     100 kB\n")
        held = sum(shard.data.nbytes for value in whole for shard in value.get_value().addressable_shards)
        with pytest.raises(ResourceError, match=f"the devices of this process take {held:,} bytes in float32, 102,400"):
            restore_model(weights, mesh=mesh)


def codes(folder: Path) -> None:
    """On 8 devices: codes over the mesh and stacked, which decode to the plain restore's numbers, bit for bit."""
    weights, mesh = Weights.open(folder), make_mesh(parse_mesh("fsdp=2,expert=2,tensor=2"), jax.devices())
    plain = leaves(restore_model(weights, drafts=True))
    for scanned in (False, True):
        found = leaves(restore_model(weights, drafts=True, mesh=mesh, scanned=scanned, encoded=True))
        here = leaves(restore_model(weights, drafts=True, scanned=scanned, encoded=True))
        coded = 0
        for key, variable in found.items():
            value = variable.get_value()
            assert jax.tree.structure(value) == jax.tree.structure(here[key].get_value()), key
            assert all(map(np.array_equal, jax.tree.leaves(value), jax.tree.leaves(here[key].get_value()))), key
            if key in plain:
                expected = np.asarray(plain[key].get_value())
            else:
                _, _, segment, place, *rest = key
                layers = segments(weights.config)[segment].layers(place)
                expected = np.stack([np.asarray(plain["layers", layer, *rest].get_value()) for layer in layers])
            assert np.array_equal(np.asarray(value[...]), expected), key
            if isinstance(value, Encoded):
                coded += 1
                specs = partitions(value, variable.axes, mesh.shape, what=str(key))
                assert value.codes.sharding == NamedSharding(mesh, specs.codes), key
                assert value.scales.sharding == NamedSharding(mesh, specs.scales), key
        assert coded > 20
    _, planned = compiled_weights(weights.config, mesh, Job(tokens=8, batch=8, dtype=FLOAT32, source=True))
    forms = {key: _form(variable) for key, variable in nnx.to_flat_state(planned)}
    assert {key: _form(variable) for key, variable in found.items()} == forms  # what `dsv4 compile` compiles
    with pytest.raises(UsageError, match=r"in blocks of 128 that share a scale, which the mesh axes tensor=4 do not"):
        restore_model(weights, mesh=make_mesh({"tensor": 4, "data": 2}, jax.devices()), encoded=True)


def tables(folder: Path) -> None:
    """On 8 devices: every device has an eighth of the rows of V4.1's tables, with zeros after the last one."""
    weights, mesh = Weights.open(folder), make_mesh(parse_mesh("fsdp=2,expert=2,tensor=2"), jax.devices())
    for encoded in (False, True):
        plain = leaves(restore_model(weights, scanned=True, encoded=encoded))
        found = leaves(restore_model(weights, scanned=True, encoded=encoded, mesh=mesh))
        split = 0
        for key, variable in found.items():
            pairs = zip(*(jax.tree.leaves(of.get_value()) for of in (variable, plain[key])), strict=True)
            for part, whole in pairs:
                own = np.asarray(part)[tuple(map(slice, whole.shape))]
                assert np.array_equal(own, whole), key
                if key[-2:] == ("engram", "embed"):
                    rows = whole.shape[1]
                    assert part.shape[1] == rows + -rows % 8 > rows
                    assert not np.asarray(part)[:, rows:].any()
                    assert {shard.data.shape[1] for shard in part.addressable_shards} == {part.shape[1] // 8}
                    split += 1
                else:
                    assert part.shape == whole.shape, key
        assert split == 2 * (1 + encoded)
        _, planned = compiled_weights(weights.config.without_stages(), mesh,
                                      Job(tokens=8, batch=8, dtype=FLOAT32, source=encoded))  # fmt: skip
        forms = {key: _form(variable) for key, variable in nnx.to_flat_state(planned)}
        assert {key: _form(variable) for key, variable in found.items()} == forms  # what `dsv4 compile` compiles


def _form(variable: Any) -> Any:
    """Structure, shapes, dtypes and layouts of a variable."""
    parts, structure = jax.tree.flatten(variable.get_value())
    return structure, [(part.shape, part.dtype, part.sharding) for part in parts]


@contextlib.contextmanager
def counted_reads() -> Iterator[list[int]]:
    """The numbers of bytes that are read from stored arrays meanwhile."""
    sizes: list[int] = []
    read_bytes = StoredArray._read_bytes

    def noted(self: StoredArray, index: Any, runs: Any) -> None:
        runs = list(runs)
        sizes.extend(len(into) for into, _ in runs)
        read_bytes(self, index, runs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredArray, "_read_bytes", noted)
        yield sizes


def own_codes(folder: Path) -> None:
    """In each of several processes: what is read is little more than the codes that its devices hold."""
    mesh = make_mesh(parse_mesh("tensor=2,fsdp=2"), jax.devices())
    store = open_store(folder)
    with counted_reads() as sizes:
        model = restore_model(Weights(store), dtype=BFLOAT16, mesh=mesh, encoded=True)
    held = 0
    for part in jax.tree.leaves(nnx.state(model)):
        regions = {str(shard.index): shard.data.nbytes for shard in part.addressable_shards}
        held += sum(regions.values())
    total = sum(part.nbytes for part in jax.tree.leaves(nnx.state(model)))
    assert held < 0.7 * total, (held, total)
    assert sum(sizes) < 1.1 * held, (sum(sizes), held)


def own_ranges(folder: Path) -> None:
    """In each of several processes: what is read is what its devices hold, and plain Orbax gives the same arrays."""
    mesh = make_mesh(parse_mesh("tensor=2,fsdp=2"), jax.devices())
    store = open_store(folder)
    with counted_reads() as sizes:
        variables = leaves(restore_model(Weights(store), drafts=True, dtype=BFLOAT16, mesh=mesh))
    arrays = {".".join(map(str, key)): variable.get_value() for key, variable in variables.items()}
    assert arrays.keys() == set(store.paths)
    share = sum(_held(store, path, array) for path, array in arrays.items())
    total = sum(store.leaf(path).nbytes for path in store.paths)
    assert sum(sizes) == share, (sum(sizes), share)
    experts = [path for path in arrays if ".experts." in path]
    assert len(experts) == 7 * 3
    assert sum(_held(store, path, arrays[path]) for path in experts) == sum(store.leaf(e).nbytes for e in experts) / 2
    assert share < 0.65 * total, (share, total)

    abstract = {
        path: jax.ShapeDtypeStruct(array.shape, store.leaf(path).dtype, sharding=array.sharding)
        for path, array in arrays.items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        theirs = dict(_flat(checkpointer.restore(folder, nested(abstract))))
    for path, array in arrays.items():
        assert theirs[path].sharding == array.sharding, path
        for ours, its in zip(array.addressable_shards, theirs[path].addressable_shards, strict=True):
            assert ours.device == its.device
            assert np.array_equal(np.asarray(ours.data), np.asarray(its.data).astype(array.dtype)), path
    print(jax.process_index(), len(arrays), share, total)


class _Counted:
    """Reads parts of an array, each of which waits until ``expected`` are read side by side."""

    def __init__(self, values: np.ndarray, expected: int) -> None:
        self.values = values
        self.regions: list[Any] = []
        self.inside = self.most = 0
        self._lock = threading.Lock()
        self._together = threading.Barrier(expected)

    def __call__(self, region: Any) -> np.ndarray:
        with self._lock:
            self.regions.append(region)
            self.inside += 1
            self.most = max(self.most, self.inside)
            patience = 5 if len(self.regions) <= self._together.parties else 0.2  # the last ones may be fewer
        with contextlib.suppress(threading.BrokenBarrierError):
            self._together.wait(patience)
        with self._lock:
            self.inside -= 1
        return self.values[region]


def at_once(folder: Path) -> None:
    """On 8 devices: parts are read side by side, as many as the budget has room for, and each once."""
    sharding = NamedSharding(jax.make_mesh((4, 2), ("x", "y")), PartitionSpec("x"))
    values = np.arange(4 * 1000, dtype=np.float32).reshape(4, 1000)
    for budget, expected in ((2 * 4000, 2), (3 * 4000 + 1, 3), (1, 1)):
        read = _Counted(values, expected)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(restore, "_BYTES_AT_ONCE", budget)
            patch.setattr(restore.os, "cpu_count", lambda: 16)
            array = restore.read_sharded(values.shape, FLOAT32, sharding, read)
        assert np.array_equal(np.asarray(array), values)
        assert read.most == expected
        assert len(read.regions) == 4  # of 8 devices, two hold each
        assert array.sharding == sharding


def _held(store: Store, path: str, array: jax.Array) -> int:
    """Stored bytes of what this process holds of an array, each number once."""
    parts = {str(shard.index): shard.data.size for shard in array.addressable_shards}
    return sum(parts.values()) * store.leaf(path).dtype.itemsize


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, jax.Array]]:
    for name, value in tree.items():
        yield from _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=["every_leaf", "own_ranges", "codes", "own_codes", "tables", "at_once"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    given = parser.parse_args()
    if given.coordinator is not None:
        join(given.coordinator, given.num_processes, given.process_id)
    globals()[given.part](given.folder)
