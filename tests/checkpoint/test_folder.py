"""Opening checkpoint folders and reading from them."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from dsv4_convert.checkpoint import open_checkpoint
from dsv4_convert.errors import BadInput, ResourceError, UsageError

from .safetensors_files import raw_file, u8_header, write_folder, write_u8_shard

INDEX = "model.safetensors.index.json"
ONE, TWO, THREE = (f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3))
SHARDS = {ONE: {"embed": b"12345"}, TWO: {"a.0": b"67", "a.1": b"8"}, THREE: {"b.0": b"90"}}
REPOSITORY = Path(__file__).parents[2]  # where a process of its own finds the packages
COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", SHARDS)


def set_weight_map(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


# --- opening ---------------------------------------------------------------------------------------------------------


def test_opens_what_the_index_describes(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.root == folder
        assert checkpoint.config == {"model_type": "tiny"}
        assert [shard.name for shard in checkpoint.shards] == [ONE, TWO, THREE]
        assert {name: bytes(checkpoint.read_bytes(name)) for name in checkpoint.tensors} == {
            name: content for tensors in SHARDS.values() for name, content in tensors.items()
        }
        assert checkpoint.revision is None
        assert not checkpoint.absent
    with pytest.raises(ValueError, match="closed"):
        checkpoint.read("embed")


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_opens_a_single_file_without_an_index(folder: Path, name: str) -> None:
    for file in (INDEX, TWO, THREE):
        (folder / file).unlink()
    (folder / ONE).rename(folder / name)
    assert list(open_checkpoint(str(folder)).tensors) == ["embed"]


def test_opening_touches_no_tensor(tmp_path: Path) -> None:
    """A terabyte of nothing opens at once, and its last row can be read."""
    rows = 1 << 20
    header = {"big": {"dtype": "U8", "shape": [rows, rows], "data_offsets": [0, rows * rows]}}
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw_file(header))
    os.truncate(file, file.stat().st_size + rows * rows)
    (tmp_path / "config.json").write_text("{}")
    with open_checkpoint(tmp_path) as checkpoint:
        last = checkpoint.read_rows("big", rows - 1, rows)
        assert last.shape == (1, rows)
        assert not last.any()
        del last


def test_partial_download(folder: Path) -> None:
    (folder / TWO).unlink()
    with pytest.raises(BadInput, match=f"1 of 3 shards are missing(.|\n)*{TWO}"):
        open_checkpoint(folder)
    checkpoint = open_checkpoint(folder, partial=True)
    assert set(checkpoint.tensors) == {"embed", "b.0"}
    assert checkpoint.absent == {"a.0", "a.1"}
    with pytest.raises(BadInput, match=r"a\.0 was not downloaded"):
        checkpoint.read("a.0")
    with pytest.raises(BadInput, match="no tensor 'c'"):
        checkpoint.read("c")


def test_missing_shards_are_listed_together_and_explained(folder: Path) -> None:
    (folder / ONE).unlink()
    (folder / THREE).unlink()
    traces = folder / ".cache" / "huggingface" / "download"
    traces.mkdir(parents=True)
    (traces / "abc.incomplete").touch()
    with pytest.raises(BadInput, match=f"2 of 3 shards are missing .a download was cut off.(.|\n)*{ONE}(.|\n)*{THREE}"):
        open_checkpoint(folder)
    (folder / TWO).unlink()
    with pytest.raises(BadInput, match=r"no \.safetensors file"):
        open_checkpoint(folder, partial=True)


@pytest.mark.parametrize(
    "shard",
    [
        pytest.param("../evil.safetensors", id="I01"),
        pytest.param("a/../../evil.safetensors", id="I01 inside"),
        pytest.param("sub/x.safetensors", id="I01 sub"),
        pytest.param("/tmp/evil.safetensors", id="I02"),
        pytest.param("..\\evil.safetensors", id="I03"),
        pytest.param("C:evil.safetensors", id="I03 drive"),
        pytest.param("http://evil/x.safetensors", id="I04"),
        pytest.param("x.safetensors\n", id="line end"),
        pytest.param("x.bin", id="suffix"),
        pytest.param(".safetensors", id="nothing but the suffix"),
        pytest.param(7, id="I14 number"),
        pytest.param(None, id="I14 null"),
        pytest.param(["x.safetensors"], id="I14 list"),
    ],
)
def test_shard_names_that_are_not_plain(folder: Path, shard: object) -> None:
    set_weight_map(folder, lambda weight_map: weight_map.update({"a.0": shard}))
    with pytest.raises(BadInput, match=r"plain file name(.|\n)*'a.0'"):
        open_checkpoint(folder, partial=True)


def test_index_and_shards_contradict_each_other(folder: Path) -> None:
    """I07, I08, I09 and I10 at once: all are listed."""

    def change(weight_map: dict[str, object]) -> None:
        weight_map["b.0"] = ONE  # I10: it is in THREE
        weight_map["ghost"] = TWO  # I07
        del weight_map["a.1"]  # I08
        weight_map["c"] = THREE

    set_weight_map(folder, change)
    write_u8_shard(folder / THREE, {"b.0": b"90", "embed": b"1", "c": b"2"})  # I09
    with pytest.raises(BadInput) as caught:
        open_checkpoint(folder)
    for problem in (
        f"'b.0': the index says {ONE}, but it is in {THREE}",
        f"'ghost': the index says {TWO}, but it is in no shard",
        f"'a.1': in {TWO}, but not in the index",
        f"'embed': in several shards: {ONE}, {THREE}",
    ):
        assert problem in str(caught.value)


def test_shards_that_nobody_names(folder: Path) -> None:
    write_u8_shard(folder / "extra.safetensors", {"x": b"1"})
    with pytest.raises(BadInput, match=r"does not name these files(.|\n)*extra"):
        open_checkpoint(folder)  # I06
    (folder / "extra.safetensors").unlink()
    (folder / INDEX).unlink()
    with pytest.raises(BadInput, match=f"3 .safetensors files but no {INDEX}"):
        open_checkpoint(folder)  # I12


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not JSON"),
        ("{oops", "not JSON"),
        ("[]", "expected a JSON object, found list"),
        ("<html>", "a web page"),
        ('{"metadata": {}}', "found none"),
        ('{"weight_map": {}}', "non-empty"),
        ('{"weight_map": []}', "found list"),
        (f'{{"weight_map": {{"embed": "{ONE}", "embed": "{TWO}"}}}}', "'embed' appears twice"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
)
def test_index_that_cannot_be_used(folder: Path, text: str, expected: str) -> None:
    (folder / INDEX).write_text(text)  # I14
    with pytest.raises(BadInput, match=expected):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ('{"a": {"b": 1, "b": 1}}', "'b' appears twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ("\ufeff{}", "not JSON"),
        ("3", "expected a JSON object, found int"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_config_that_cannot_be_used(folder: Path, text: str, expected: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(BadInput, match=expected):
        open_checkpoint(folder)


def test_damaged_shards_are_listed_together(folder: Path) -> None:
    (folder / ONE).write_bytes((folder / ONE).read_bytes()[:-1])
    (folder / THREE).write_bytes(b"")
    with pytest.raises(BadInput, match=f"2 of 3 shards(.|\n)*{ONE}: truncated(.|\n)*{THREE}: empty"):
        open_checkpoint(folder)


def test_paths_that_are_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "models--a--b" / "snapshots").mkdir(parents=True)
    for name, expected in {
        "missing": "no such folder",
        "file": "give the folder",
        "empty": "no config.json",
        "models--a--b": "a repository in the Hub cache",
    }.items():
        with pytest.raises(BadInput, match=expected):
            open_checkpoint(tmp_path / name)


# --- links and revisions ---------------------------------------------------------------------------------------------


def make_snapshot(folder: Path, cache: Path) -> Path:
    """The folder as a snapshot of the Hub cache: links to blobs, one of them to the store that the cache shares."""
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (cache / "blobs" / "ab").mkdir(parents=True)
    for file in folder.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    shared = cache / "blobs" / "ab" / "abcdef"
    blob = (snapshot / ONE).resolve()
    blob.rename(shared)
    blob.symlink_to(Path("../../blobs/ab/abcdef"))
    return snapshot


def test_snapshot_of_the_hub_cache(folder: Path, tmp_path: Path) -> None:
    snapshot = make_snapshot(folder, tmp_path / "cache")
    (tmp_path / "shortcut").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "shortcut"):
        checkpoint = open_checkpoint(path)
        assert checkpoint.revision == COMMIT
        assert bytes(checkpoint.read("embed")) == b"12345"


@pytest.mark.parametrize("in_cache", [False, True])
def test_links_out_of_the_checkpoint(folder: Path, tmp_path: Path, in_cache: bool) -> None:
    root = make_snapshot(folder, tmp_path / "cache") if in_cache else folder
    outside = tmp_path / "outside.safetensors"
    write_u8_shard(outside, SHARDS[TWO])
    (root / TWO).unlink()
    (root / TWO).symlink_to(outside)
    with pytest.raises(BadInput, match="a link out of the checkpoint"):
        open_checkpoint(root)


def test_links_to_nothing_and_inside(folder: Path) -> None:
    (folder / TWO).unlink()
    (folder / TWO).symlink_to("gone")
    with pytest.raises(BadInput, match=f"{TWO}: a link to gone, which does not exist"):
        open_checkpoint(folder)
    (folder / TWO).unlink()
    (folder / "store").mkdir()
    write_u8_shard(folder / "store" / "x", SHARDS[TWO])
    (folder / TWO).symlink_to("store/x")
    assert bytes(open_checkpoint(folder).read("a.1")) == b"8"


def record(folder: Path, name: str, commit: str, *, age: float = 0) -> None:
    """Write the Hub client's record of a file that it downloaded to a folder."""
    path = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{commit}\n{'a' * 64}\n{(folder / name).stat().st_mtime - age}\n")


def test_revision_of_a_download_to_a_folder(folder: Path) -> None:
    files = ("config.json", INDEX, ONE, TWO, THREE)
    for name in files[:-1]:
        record(folder, name, COMMIT)
    assert open_checkpoint(folder).revision is None  # of one file it is not known
    record(folder, THREE, COMMIT)
    assert open_checkpoint(folder).revision == COMMIT
    record(folder, ONE, COMMIT, age=60)
    assert open_checkpoint(folder).revision is None  # changed after the download
    record(folder, ONE, OTHER)
    with pytest.raises(BadInput, match=f"2 revisions(.|\n)*{OTHER}: {ONE}"):
        open_checkpoint(folder)  # I13


# --- reading ---------------------------------------------------------------------------------------------------------


def test_arrays_are_what_torch_reads(tmp_path: Path) -> None:
    """Bit for bit, shape and dtype, for every dtype of a published checkpoint and some more."""
    bits = torch.randint(0, 256, (6, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = {
        torch.int8: np.int8,
        torch.uint8: np.uint8,
        torch.int16: np.int16,
        torch.uint16: np.uint16,
        torch.int32: np.int32,
        torch.uint32: np.uint32,
        torch.int64: np.int64,
        torch.uint64: np.uint64,
        torch.float64: np.float64,
        torch.float32: np.float32,
        torch.float16: np.float16,
        torch.bfloat16: ml_dtypes.bfloat16,
        torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
        torch.float8_e5m2: ml_dtypes.float8_e5m2,
        torch.float8_e8m0fnu: ml_dtypes.float8_e8m0fnu,
    }
    tensors = {str(dtype): bits.clone().view(dtype) for dtype in expected} | {"scalar": torch.tensor(2.5)}
    tensors |= {"f4": bits.clone().view(torch.float4_e2m1fn_x2), "empty": torch.zeros(0, 7), "bool": bits > 99}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with open_checkpoint(tmp_path) as checkpoint:
        for dtype, array_dtype in expected.items():
            array = checkpoint.read(str(dtype))
            assert array.dtype == array_dtype
            assert array.shape == tuple(tensors[str(dtype)].shape)
            assert not array.flags.writeable
            assert not array.flags.owndata
            assert array.tobytes() == bits.numpy().tobytes() == bytes(checkpoint.read_bytes(str(dtype)))
            assert checkpoint.read_rows(str(dtype), 2, 4).tobytes() == bits[2:4].numpy().tobytes()
            if dtype.is_floating_point:
                with np.errstate(invalid="ignore"):  # signalling NaN
                    values = array.astype(np.float64)
                np.testing.assert_array_equal(values, bits.view(dtype).double().numpy())
            del array
        packed = checkpoint.read("f4")
        assert packed.dtype == np.uint8
        assert packed.tobytes() == bits.numpy().tobytes()
        assert checkpoint.read("bool").dtype == np.bool_
        assert np.array_equal(checkpoint.read("bool"), bits.numpy() > 99)
        assert checkpoint.read("scalar").shape == ()
        assert checkpoint.read("scalar") == np.float32(2.5)
        assert checkpoint.read("empty").shape == (0, 7)
        with pytest.raises(UsageError, match="rows 0:1 do not lie inside"):
            checkpoint.read_rows("scalar", 0, 1)
        with pytest.raises(UsageError, match=r"rows 5:7 do not lie inside shape \[6, 32\]"):
            checkpoint.read_rows("torch.uint8", 5, 7)
        del packed


def test_misaligned_tensors_are_copied(tmp_path: Path) -> None:
    header = u8_header({"byte": 1}) | {"f": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}
    content = np.arange(2, dtype=np.float32).tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "model.safetensors").write_bytes(raw_file(text, b"x" + content))
    (tmp_path / "config.json").write_text("{}")
    with open_checkpoint(tmp_path) as checkpoint:
        array = checkpoint.read("f")
        assert array.flags.aligned
        assert not array.flags.writeable
        assert array.tolist() == [0.0, 1.0]


def test_arrays_outlive_the_checkpoint(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        array = checkpoint.read("embed")
    del checkpoint
    gc.collect()
    assert bytes(array) == b"12345"


@pytest.mark.parametrize("change", ["truncate", "rewrite", "replace", "remove"])
def test_files_that_change_under_us(folder: Path, change: str) -> None:
    checkpoint = open_checkpoint(folder)
    assert bytes(checkpoint.read("embed")) == b"12345"
    file = folder / ONE
    match change:
        case "truncate":
            os.truncate(file, 10)
        case "rewrite":
            os.utime(file, ns=(0, 0))
        case "replace":
            content, status = file.read_bytes(), file.stat()
            file.rename(folder / "old")
            file.write_bytes(content)
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        case _:
            file.unlink()
    for use in (lambda: checkpoint.read("embed"), lambda: checkpoint.file_sha256(file)):
        with pytest.raises(BadInput, match=f"{ONE}: (changed since|no such file)"):
            use()
    assert bytes(checkpoint.read("b.0")) == b"90"


def test_hash_of_a_file(folder: Path) -> None:
    write_u8_shard(folder / ONE, {"embed": bytes(range(256)) * 40_000})
    expected = subprocess.run(["sha256sum", folder / ONE], capture_output=True, text=True, check=True).stdout.split()[0]
    assert open_checkpoint(folder).file_sha256(folder / ONE) == expected


def test_many_threads_read_the_right_bytes(tmp_path: Path) -> None:
    shards = {
        f"s{number}.safetensors": {f"t{number}.{part}": bytes([number, part]) * 1000 for part in range(20)}
        for number in range(8)
    }
    root = write_folder(tmp_path / "m", shards)
    checkpoint = open_checkpoint(root)
    wrong: list[str] = []

    def work() -> None:
        for tensors in shards.values():
            wrong.extend(name for name, content in tensors.items() if bytes(checkpoint.read_bytes(name)) != content)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_released_memory_goes_back(tmp_path: Path) -> None:
    """Streaming through tensors keeps the resident set small; released arrays stay valid."""
    count, size = 8, 24 << 20
    contents = {f"t{number}": bytes([number + 1]) * size for number in range(count)}
    write_folder(tmp_path / "m", {"model.safetensors": contents})
    script = """
import sys, numpy as np
from dsv4_convert.checkpoint import open_checkpoint
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
checkpoint = open_checkpoint(sys.argv[1])
before, peak, kept = resident(), 0, []
for name in sorted(checkpoint.tensors):
    array = checkpoint.read(name)
    assert array.min() == array.max() == int(name[1:]) + 1
    peak = max(peak, resident())
    checkpoint.release(name)
    kept.append(array)
print((peak - before) >> 20, (resident() - before) >> 20)
assert [int(array[-1]) for array in kept] == list(range(1, len(kept) + 1))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "m"], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    peak, after = map(int, done.stdout.split())
    assert 20 <= peak < 40
    assert after < 10


def test_errors_are_ours() -> None:
    """The classes that the command line turns into exit codes."""
    assert BadInput.exit_code == 3
    assert ResourceError.exit_code == 4
