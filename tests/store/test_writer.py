"""Writing: the same files as Orbax, interruptions, and what is refused."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_convert.errors import BadInput, ResourceError, UsageError
from dsv4_convert.store import CheckpointWriter, WriteSummary, folder, open_store, verify
from dsv4_convert.store.arrays import ArrayWriter, create_array
from dsv4_convert.store.layout import DTYPES, MANIFEST_FILE, ArrayLayout, chunk_file

from .writing import FilledLeaf, write_leaves, write_pending

REPOSITORY = Path(__file__).resolve().parents[2]
BF16 = DTYPES["bfloat16"]


def write(destination: Path, leaves: list[FilledLeaf], **options: Any) -> WriteSummary:
    return write_leaves(destination, leaves, fingerprint={"revision": "r1"}, **options)


def partial(destination: Path) -> Path:
    return destination.with_name(destination.name + ".dsv4-partial")


def array_files(folder: Path) -> dict[str, bytes]:
    """Every file of the arrays, by its path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*/*") if file.is_file()}


def failing_at(leaves: list[FilledLeaf], path: str, error: BaseException) -> list[FilledLeaf]:
    def fail(_: object) -> np.ndarray:
        raise error

    return [replace(leaf, chunks=fail) if leaf.path == path else leaf for leaf in leaves]


# What is written


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_the_files_are_those_that_orbax_writes(tmp_path: Path, arrays, compression) -> None:
    """Byte for byte, metadata and chunks, where one chunk holds the array, which is how Orbax writes NumPy arrays."""
    leaves = [array for array in arrays if arrays[array].size]
    tree = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=compression == "zstd")
    with ocp.Checkpointer(tree) as checkpointer:
        checkpointer.save(tmp_path / "orbax", args=ocp.args.PyTreeSave({path: arrays[path] for path in leaves}))
    (tmp_path / "ours").mkdir()
    for path in leaves:
        array = arrays[path]
        layout = ArrayLayout(shape=array.shape, dtype=array.dtype, chunk_shape=array.shape)
        folder = tmp_path / "ours" / path
        create_array(folder, layout, compression)
        ArrayWriter(folder, layout, compression).write_chunk((0,) * array.ndim, array)
    assert array_files(tmp_path / "ours") == array_files(tmp_path / "orbax")


_PLAIN_RESTORE = """
import sys, numpy, orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as v1
import jax
source, expected = sys.argv[1], numpy.load(sys.argv[2])
restores = {
    "StandardCheckpointer": ocp.StandardCheckpointer().restore(source),
    "PyTreeCheckpointer": ocp.PyTreeCheckpointer().restore(source),
    "v1": v1.load(source),
}
for name, tree in restores.items():
    leaves = {".".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    assert sorted(leaves) == sorted(expected.files), (name, sorted(leaves))
    for path, leaf in leaves.items():
        assert type(leaf) is numpy.ndarray, (name, path, type(leaf))
        assert f"{leaf.dtype} {leaf.shape}".encode() + leaf.tobytes() == expected[path].tobytes(), (name, path)
device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), restores["v1"])
on_device = ocp.StandardCheckpointer().restore(source, abstract)
experts = on_device["layers"]["3"]["ffn"]["experts"]["w1"]
assert isinstance(experts, jax.Array) and experts.dtype == "bfloat16", type(experts)
assert experts.tobytes() == restores["v1"]["layers"]["3"]["ffn"]["experts"]["w1"].tobytes()
assert not [name for name in sys.modules if name.startswith("dsv4")]
print(len(expected.files))
"""


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_plain_orbax_restores_every_bit_without_dsv4(tmp_path: Path, arrays, make_leaves, compression) -> None:
    write(
        tmp_path / "checkpoint",
        make_leaves(arrays),
        compression=compression,
        files={"config.json": b"{}", "tokenizer.json": b"[]"},
    )
    expected = {
        path: np.frombuffer(f"{array.dtype} {array.shape}".encode() + array.tobytes(), np.uint8)
        for path, array in arrays.items()
    }
    np.savez(tmp_path / "expected.npz", **expected)
    command = [sys.executable, "-c", _PLAIN_RESTORE, str(tmp_path / "checkpoint"), str(tmp_path / "expected.npz")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout == f"{len(arrays)}\n", result.stderr


def test_summary_and_manifest(tmp_path: Path, arrays, make_leaves) -> None:
    nbytes = sum(array.nbytes for array in arrays.values())
    with CheckpointWriter(tmp_path / "checkpoint", make_leaves(arrays), fingerprint={}) as writer:
        assert (writer.total_bytes, writer.kept_bytes) == (nbytes, 0)
        assert sum(chunk.nbytes for chunk in writer.pending()) == nbytes
        write_pending(writer)
        assert writer.pending() == []
        summary = writer.finish()
        assert not (tmp_path / "checkpoint").exists()
        files = {"sizes.json": json.dumps(summary.total_bytes).encode()}
        assert writer.commit({"leaves": len(summary.records)}, files) == summary
    assert (summary.total_bytes, summary.written_bytes, summary.kept_bytes) == (nbytes, nbytes, 0)
    store = open_store(tmp_path / "checkpoint")
    assert store.manifest.leaves == summary.records
    assert store.metadata == {"leaves": len(arrays)}
    assert store.read_file("sizes.json") == str(nbytes).encode()
    assert store.manifest.leaves["hc_head_scale"].sources == ("source.hc_head_scale",)
    assert {"_METADATA", "_CHECKPOINT_METADATA", "sizes.json"} <= set(store.manifest.files)
    assert not partial(tmp_path / "checkpoint").exists()


def test_what_is_not_all_written_is_not_committed(tmp_path: Path, arrays, make_leaves) -> None:
    leaves = make_leaves(arrays)
    with CheckpointWriter(tmp_path / "checkpoint", leaves, fingerprint={"revision": "r1"}) as writer:
        first, *others = writer.pending()
        for chunk in others:
            writer.write(chunk, chunk.leaf.chunks(chunk.index))
        with pytest.raises(ValueError, match=rf"1 chunks were not written, such as .* of {first.leaf.path}"):
            writer.commit()
    assert not (tmp_path / "checkpoint").exists()
    assert write(tmp_path / "checkpoint", leaves).written_bytes == first.nbytes


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), max_size=3),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from(["none", "zstd"]),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_any_shape_and_chunk_shape_round_trips(sizes, dtype, compression, workers, random) -> None:
    shape, chunk_shape = tuple(size for size, _ in sizes), tuple(chunk for _, chunk in sizes)
    layout = ArrayLayout(shape=shape, dtype=DTYPES[dtype], chunk_shape=chunk_shape)
    array = np.frombuffer(random.randbytes(layout.nbytes), layout.dtype).reshape(shape)
    buffers = threading.local()

    def chunks(index: tuple[int, ...]) -> np.ndarray:
        """In a buffer that the thread's next call overwrites, as a converter does it."""
        clipped = layout.clipped_shape(index)
        if not hasattr(buffers, "buffer"):
            buffers.buffer = np.empty(layout.chunk_nbytes, np.uint8)
        buffers.buffer[:] = 0xA5
        view = buffers.buffer[: int(np.prod(clipped)) * layout.dtype.itemsize].view(layout.dtype).reshape(clipped)
        view[...] = array[layout.chunk_region(index)]
        return view

    leaf = FilledLeaf(path="a.b", shape=shape, dtype=layout.dtype, chunk_shape=chunk_shape, chunks=chunks)
    with tempfile.TemporaryDirectory() as folder:
        destination = Path(folder) / "checkpoint"
        write(destination, [leaf], compression=compression, workers=workers)
        store = open_store(destination)
        assert verify(store) == []
        read = store.read("a.b")
        assert (read.shape, read.dtype, read.tobytes()) == (array.shape, array.dtype, array.tobytes())
        with ocp.PyTreeCheckpointer() as checkpointer:
            assert checkpointer.restore(destination)["a"]["b"].tobytes() == array.tobytes()


# Interruptions


@pytest.mark.parametrize("error", [RuntimeError("source lost"), KeyboardInterrupt()])
def test_a_failure_leaves_a_resumable_folder(tmp_path: Path, arrays, make_leaves, error) -> None:
    leaves = make_leaves(arrays)
    whole = write(tmp_path / "whole", leaves)
    destination = tmp_path / "checkpoint"
    middle = leaves[len(leaves) // 2].path
    with pytest.raises(type(error)):
        write(destination, failing_at(leaves, middle, error), workers=1)
    assert not destination.exists()
    made: list[str] = []

    def noted(leaf: FilledLeaf) -> FilledLeaf:
        return replace(leaf, chunks=lambda index: (made.append(leaf.path), leaf.chunks(index))[1])

    summary = write(destination, [noted(leaf) for leaf in leaves])
    assert summary.kept_bytes == sum(leaf.layout.nbytes for leaf in leaves[: len(leaves) // 2])
    assert set(made) == {leaf.path for leaf in leaves[len(leaves) // 2 :] if leaf.layout.chunk_count}
    assert summary.written_bytes == sum(leaf.layout.nbytes for leaf in leaves[len(leaves) // 2 :])
    assert summary.records == whole.records
    assert array_files(destination) == array_files(tmp_path / "whole")
    assert verify(open_store(destination)) == []


def test_what_is_lost_or_foreign_in_a_leaf_is_made_good(tmp_path: Path, arrays, make_leaves) -> None:
    leaves = make_leaves(arrays)
    destination = tmp_path / "checkpoint"
    with pytest.raises(RuntimeError):
        write(destination, failing_at(leaves, leaves[-2].path, RuntimeError()), workers=1)
    damaged = [partial(destination) / "leaves" / leaf.path for leaf in leaves[:4]]
    (damaged[0] / "1.0").unlink()
    os.truncate(damaged[1] / "0.0", 1)
    (damaged[2] / ".zarray").write_text("{}")
    (damaged[3] / "0.0.__lock").write_text("left by tensorstore")
    (damaged[3] / "5.5").write_text("not in the journal")
    lost = [math.prod(leaves[0].layout.clipped_shape((1, 0))) * leaves[0].dtype.itemsize]
    lost += [math.prod(leaves[1].layout.clipped_shape((0, 0))) * leaves[1].dtype.itemsize]
    lost += [leaf.layout.nbytes for leaf in (leaves[2], *leaves[-2:])]
    summary = write(destination, leaves)
    assert summary.written_bytes == sum(lost)
    assert verify(open_store(destination)) == []
    assert array_files(destination).keys() == array_files_of(leaves)


def array_files_of(leaves: list[FilledLeaf]) -> set[str]:
    """Names of the files that a checkpoint of these leaves has."""
    chunks = {f"{leaf.path}/{chunk_file(index)}" for leaf in leaves for index in leaf.layout.chunk_indices()}
    return chunks | {f"{leaf.path}/.zarray" for leaf in leaves}


def test_an_interrupted_leaf_keeps_its_finished_chunks(tmp_path: Path) -> None:
    """A kill costs the chunks in flight, not the stack of experts that they belong to."""
    made: list[int] = []

    def chunks(index: tuple[int, ...]) -> np.ndarray:
        if len(made) == 5:
            made.append(-1)
            raise RuntimeError
        made.append(index[0])
        return np.full((1, 4), index[0], np.int32)

    leaf = FilledLeaf(path="w", shape=(8, 4), dtype=np.dtype("<i4"), chunk_shape=(1, 4), chunks=chunks)
    with pytest.raises(RuntimeError):
        write(tmp_path / "checkpoint", [leaf], workers=1)
    write(tmp_path / "checkpoint", [leaf], workers=1)
    assert made == [0, 1, 2, 3, 4, -1, 5, 6, 7]
    assert verify(open_store(tmp_path / "checkpoint")) == []


def test_what_was_found_out_is_kept_over_interruptions(tmp_path: Path, arrays, make_leaves) -> None:
    leaves = make_leaves(arrays)
    with CheckpointWriter(tmp_path / "out", leaves, fingerprint={}) as writer:
        assert writer.side_records == {}
        writer.add_side_record("early", {"found": [1]})
    with CheckpointWriter(tmp_path / "out", leaves, fingerprint={}) as writer:
        assert writer.side_records == {"early": {"found": [1]}}
        writer.add_side_record("late", None)
        write_pending(writer)
        summary = writer.commit()
    assert summary.side_records == {"early": {"found": [1]}, "late": None}


def test_the_same_leaves_give_the_same_files(tmp_path: Path, arrays, make_leaves) -> None:
    """Every byte, Orbax's metadata and the manifest included, however the work was cut up."""
    leaves = make_leaves(arrays)
    write(tmp_path / "once", leaves, workers=3)
    with pytest.raises(RuntimeError):
        write(tmp_path / "twice", failing_at(leaves, leaves[5].path, RuntimeError()), workers=2)
    write(tmp_path / "twice", leaves, workers=1)
    once, twice = (
        {
            str(file.relative_to(tmp_path / name)): file.read_bytes()
            for file in (tmp_path / name).rglob("*")
            if file.is_file()
        }
        for name in ("once", "twice")
    )
    assert once == twice


_KILLED = """
import os, shutil, signal, sys
import numpy as np
import orbax.checkpoint  # imported before the fork, to save the children the time
from pathlib import Path
from dsv4_convert.store import open_store, verify
from tests.store.writing import FilledLeaf, write_leaves

folder, first, step = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
destination = folder / "checkpoint"
rng = np.random.default_rng(0)
arrays = {f"layers.{n}.w": rng.random((5, 3), np.float32) for n in range(3)}
leaves = [
    FilledLeaf(path=path, shape=(5, 3), dtype=np.dtype("<f4"), chunk_shape=(2, 3),
             chunks=lambda index, array=array: array[2 * index[0]:2 * index[0] + 2])
    for path, array in arrays.items()
]

def write(overwrite):
    write_leaves(destination, leaves, overwrite=overwrite, workers=1)

def in_child(action):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]

def killed_at(event_number, overwrite):
    # Every change of a file that Python makes below the folder is one event; the process is killed before it happens.
    seen = 0
    named = {"open", "os.mkdir", "os.rename", "os.truncate"}
    relative = {"os.remove", "os.rmdir"}  # inside shutil.rmtree, where the path is relative to an open folder
    def hook(event, arguments):
        nonlocal seen
        if event in relative or event in named and str(folder) in str(arguments[0]):
            seen += 1
            if seen == event_number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    write(overwrite)

def check(event_number):
    store = open_store(destination)
    assert verify(store) == [], event_number
    assert all(np.array_equal(store.read(path), array) for path, array in arrays.items())
    return store.manifest.leaves

def clear():
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

whole = None
for overwrite in (False, True):
    kills = 0
    for event_number in range(first, 10_000, step):
        if overwrite:
            assert in_child(lambda: write(False)) == 0
        status = in_child(lambda: killed_at(event_number, overwrite))
        if status == 0:
            break
        assert status == signal.SIGKILL, status
        kills += 1
        if destination.exists():
            assert check(event_number) == whole
        if overwrite or not destination.exists():
            assert in_child(lambda: write(overwrite)) == 0, event_number
        whole = check(event_number) if whole is None else whole
        assert check(event_number) == whole
        assert overwrite or not (folder / "checkpoint.dsv4-partial").exists() or destination.exists()
        clear()
    else:
        raise AssertionError("never finished")
    clear()
    print(kills)
"""


def test_killed_at_many_moments_it_is_absent_resumable_or_complete(tmp_path: Path) -> None:
    """A sample of the moments: every seventh change of a file."""
    command = [sys.executable, "-c", _KILLED, str(tmp_path), "2", "7"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    fresh, overwriting = map(int, result.stdout.split())
    assert fresh >= 7
    assert overwriting >= 7


def test_a_torn_journal_line_is_dropped_and_a_damaged_one_refused(tmp_path: Path, arrays, make_leaves) -> None:
    leaves = make_leaves(arrays)
    destination = tmp_path / "checkpoint"
    with pytest.raises(RuntimeError):
        write(destination, failing_at(leaves, leaves[4].path, RuntimeError()), workers=1)
    journal = partial(destination) / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-20])
    with pytest.raises(RuntimeError):
        write(destination, failing_at(leaves, leaves[4].path, RuntimeError()), workers=1)
    assert journal.read_bytes() == whole
    journal.write_bytes(whole.replace(b'"digest"', b'"dig\xffst"'))
    with pytest.raises(BadInput, match=r"journal\.jsonl: the journal is damaged"):
        write(destination, leaves)
    assert write(destination, leaves, restart=True).kept_bytes == 0


def test_other_settings_do_not_continue_an_interrupted_run(tmp_path: Path, arrays, make_leaves) -> None:
    leaves = make_leaves(arrays)
    destination = tmp_path / "checkpoint"
    with pytest.raises(RuntimeError):
        write(destination, failing_at(leaves, leaves[-2].path, RuntimeError()))
    with pytest.raises(UsageError, match=r"fingerprint\.revision: 'r1' then, 'r2' now"):
        write_leaves(destination, leaves, fingerprint={"revision": "r2"})
    with pytest.raises(UsageError, match="compression: 'none' then, 'zstd' now"):
        write(destination, leaves, compression="zstd")
    for changed in (leaves[:-1], [replace(leaf, rule="other") for leaf in leaves]):
        with pytest.raises(UsageError, match="leaves: "):
            write(destination, changed)
    summary = write_leaves(destination, leaves, fingerprint={"revision": "r2"}, restart=True)
    assert summary.kept_bytes == 0
    assert verify(open_store(destination)) == []


# The destination


def test_an_existing_destination_is_replaced_only_on_request(tmp_path: Path, arrays, make_leaves) -> None:
    destination = tmp_path / "checkpoint"
    leaves = make_leaves(arrays)
    write(destination, leaves)
    with pytest.raises(UsageError, match="exists already"):
        write(destination, leaves[:2])
    assert open_store(destination).paths == tuple(sorted(arrays))
    assert not partial(destination).exists()
    with pytest.raises(RuntimeError):
        write(destination, failing_at(leaves, leaves[-2].path, RuntimeError()), overwrite=True)
    assert verify(open_store(destination)) == []
    write(destination, leaves[:2], overwrite=True, restart=True)
    assert open_store(destination).paths == tuple(sorted(leaf.path for leaf in leaves[:2]))
    assert not partial(destination).exists()


def test_when_overwriting_stops_between_the_renames_the_old_checkpoint_comes_back(
    tmp_path: Path, arrays, make_leaves, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "checkpoint"
    leaves = make_leaves(arrays)
    write(destination, leaves[:2])
    rename = Path.rename

    def refuse_to_publish(self: Path, target: Path) -> Path:
        if target == destination:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_to_publish)
    with pytest.raises(ResourceError, match="cannot write: Input/output error"):
        write(destination, leaves, overwrite=True)
    assert not destination.exists()
    monkeypatch.undo()
    with pytest.raises(UsageError, match="exists already"):
        write(destination, leaves)
    assert open_store(destination).paths == tuple(sorted(leaf.path for leaf in leaves[:2]))
    assert write(destination, leaves, overwrite=True).written_bytes == 0
    assert open_store(destination).paths == tuple(sorted(arrays))


def test_a_folder_that_is_no_checkpoint_is_never_replaced(tmp_path: Path, arrays, make_leaves) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UsageError, match=f"not a checkpoint that dsv4 converted .no {MANIFEST_FILE}"):
        write(tmp_path / "photos", make_leaves(arrays), overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["photos"]


def test_only_one_writer_at_a_time(tmp_path: Path, arrays, make_leaves) -> None:
    leaves = make_leaves(arrays)
    destination = tmp_path / "checkpoint"
    refusals: list[ResourceError] = []

    def second_writer(index: tuple[int, ...]) -> np.ndarray:
        with pytest.raises(ResourceError, match=f"another process .pid {os.getpid()}. is writing") as caught:
            write(destination, leaves)
        refusals.append(caught.value)
        return leaves[0].chunks(index)

    write(destination, [replace(leaves[0], chunks=second_writer), *leaves[1:]])
    assert len(refusals) == leaves[0].layout.chunk_count
    assert verify(open_store(destination)) == []


def test_a_destination_that_appears_before_the_lock_is_held_is_not_replaced(
    tmp_path: Path, arrays, make_leaves, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "checkpoint"

    held = folder.Folder.held

    def late(self: folder.Folder) -> Any:
        destination.mkdir()
        return held(self)

    monkeypatch.setattr(folder.Folder, "held", late)
    with pytest.raises(UsageError, match="exists already"):
        write(destination, make_leaves(arrays))
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


# What is refused


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (np.zeros((3, 5), np.float32), "got float32"),
        (np.zeros((3, 4), BF16), r"got bfloat16 \(3, 4\)"),
        (np.zeros((5, 3), BF16).T, r"got bfloat16 \(3, 5\), not C-contiguous"),
    ],
)
def test_a_wrong_chunk_is_refused(tmp_path: Path, chunk, message) -> None:
    leaf = FilledLeaf(path="a.b", shape=(6, 5), dtype=BF16, chunk_shape=(3, 5), chunks=lambda _: chunk)
    with pytest.raises(ValueError, match=rf"a\.b, chunk \(0, 0\): {message}.*expected bfloat16 \(3, 5\)"):
        write(tmp_path / "checkpoint", [leaf], workers=1)


def test_leaves_that_form_no_tree_are_refused(tmp_path: Path, arrays, make_leaves) -> None:
    leaves = make_leaves(arrays)
    for wrong in ([*leaves, leaves[0]], [*leaves, replace(leaves[0], path="hc_head_scale.x")], []):
        with pytest.raises(ValueError, match=r"do not form a tree|at least one leaf"):
            write(tmp_path / "checkpoint", wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["_METADATA", MANIFEST_FILE, "hc_head_scale", "../x", ""])
def test_extra_files_cannot_replace_anything(tmp_path: Path, arrays, make_leaves, name) -> None:
    destination = tmp_path / "checkpoint"
    with pytest.raises(ValueError, match="extra file"):
        write(destination, make_leaves(arrays), files={name: b""})
    assert not destination.exists()
    assert write(destination, make_leaves(arrays)).written_bytes == 0
    assert verify(open_store(destination)) == []


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_full_disk_is_a_resource_error_that_can_be_resumed(tmp_path: Path, arrays, make_leaves, compression) -> None:
    """A file-size limit makes the system refuse the write of the last, large leaf."""
    big = np.frombuffer(np.random.default_rng(0).bytes(1 << 20), np.uint8)
    leaf = FilledLeaf(path="z", shape=big.shape, dtype=big.dtype, chunk_shape=big.shape, chunks=lambda _: big)
    leaves = [*make_leaves(arrays), leaf]
    destination = tmp_path / "checkpoint"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
    try:
        with pytest.raises(ResourceError, match=r"z.*cannot write.*run the same command again"):
            write(destination, leaves, compression=compression, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert write(destination, leaves, compression=compression).written_bytes == big.nbytes


def test_an_error_of_the_source_is_not_called_a_write_error(tmp_path: Path, arrays, make_leaves) -> None:
    leaves = failing_at(make_leaves(arrays), "hc_head_scale", OSError(errno.EIO, "source"))
    with pytest.raises(OSError, match="source"):
        write(tmp_path / "checkpoint", leaves)


# Resources and manners


_LARGE = """
import sys, threading
from pathlib import Path
import numpy as np
from dsv4_convert.store import open_store, row_chunks, verify
from tests.store.writing import FilledLeaf, write_leaves

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

buffers = threading.local()
def chunks(index):
    if not hasattr(buffers, "buffer"):
        buffers.buffer = np.zeros((1, 1024, 1024), np.float32)
    buffers.buffer[...] = index[0]
    return buffers.buffer

def write(name, experts):
    leaf = FilledLeaf(path="experts", shape=(experts, 1024, 1024), dtype=np.dtype("<f4"), chunk_shape=(1, 1024, 1024),
                    chunks=chunks)
    write_leaves(Path(sys.argv[1], name), [leaf])

write("small", 2)
verify(open_store(Path(sys.argv[1], "small")))
before = peak()
write("large", 64)
store = open_store(Path(sys.argv[1], "large"))
assert store.read("experts", 17)[0, 0] == 17
assert verify(store) == []
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_a_leaf_far_larger_than_a_chunk_needs_the_memory_of_chunks_and_nothing_is_printed(tmp_path: Path) -> None:
    """256 MiB in chunks of 4 MiB, written, read and verified: a few chunks more than a leaf of two chunks needs."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, "-c", _LARGE, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.stderr == ""
    assert int(result.stdout) < 64 << 20


def test_the_log_level_of_others_is_left_alone(tmp_path: Path, arrays, make_leaves) -> None:
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        write(tmp_path / "checkpoint", make_leaves(arrays))
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(before)


def test_a_sigkill_from_outside_is_survived(tmp_path: Path) -> None:
    """The real thing, once: the process ends in the middle of a chunk and the lock is free at once."""
    script = (
        "import sys, time, numpy as np\nfrom tests.store.writing import *\n"
        "def chunks(index):\n"
        "    print(index[0], flush=True)\n"
        "    time.sleep(0 if index[0] < 3 or sys.argv[2] == 'whole' else 60)\n"
        "    return np.full((1, 4), index[0], np.int32)\n"
        "leaves = [FilledLeaf(path=f'l{n}', shape=(s, 4), dtype=np.dtype('<i4'), chunk_shape=(1, 4), chunks=chunks)"
        " for n, s in enumerate((2, 6))]\n"
        "print(write_leaves(sys.argv[1], leaves, workers=1).kept_bytes)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    destination = tmp_path / "checkpoint"
    command = [sys.executable, "-c", script, str(destination)]
    with subprocess.Popen([*command, "killed"], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line == "3\n" for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not destination.exists()
    assert partial(destination).exists()
    result = subprocess.run([*command, "whole"], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["3", "4", "5", "80"]
    assert verify(open_store(destination)) == []
