"""Two checkpoints: equal ones in every storage and dialect, and planted differences in numbers of torch."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import dsv4_convert.golden as golden_package
from dsv4_convert.cli import app
from dsv4_convert.convert import Storage, hf_to_orbax
from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import parameters
from dsv4_convert.weights import difference
from dsv4_convert.weights.difference import CheckpointDifference, StoredOtherwise, compare_checkpoints


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the released form, one in bfloat16, and conversions of the former."""
    root = tmp_path_factory.mktemp("difference")
    write_checkpoint(root / "hf", tiny_config())
    write_checkpoint(root / "plain", tiny_config(vocab_size=300), form="bf16")
    for storage in Storage:
        hf_to_orbax(root / "hf", root / storage, storage=storage)
    hf_to_orbax(root / "plain", root / "plain-orbax")
    return root


def edited(folder: Path, to: Path, tensor: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy in which one tensor is another."""
    shutil.copytree(folder, to)
    (shard,) = (file for file in sorted(to.glob("*.safetensors")) if tensor in load_file(file))
    tensors = load_file(shard)
    tensors[tensor] = edit(tensors[tensor].clone()).contiguous()
    save_file(tensors, shard)
    return to


def number_of_parameters(folder: Path) -> int:
    return len(list(parameters(Config.from_file(folder))))


@pytest.mark.parametrize("storage", Storage)
def test_a_conversion_has_the_values_of_its_source(root: Path, storage: Storage) -> None:
    found = compare_checkpoints(root / "hf", root / storage)
    assert found.equal
    assert found.equal_bytes + len(found.stored_otherwise) == number_of_parameters(root / "hf")
    assert (found.equal_bytes == number_of_parameters(root / "hf")) == (storage is Storage.SOURCE)
    ways = {one.path: one.stored for one in found.stored_otherwise}
    if storage is not Storage.SOURCE:
        assert ways["layers.0.attn.wq_a"] == ("FP8, scales float8_e8m0fnu", storage)
        assert ways["mtp.0.ffn.experts.w1"] == ("FP4, scales float8_e8m0fnu", storage)


def test_another_layout_on_disk(root: Path) -> None:
    """A conversion stores matrices transposed, and the experts of a layer in one array."""
    found = compare_checkpoints(root / "plain", root / "plain-orbax")
    assert (found.equal, found.equal_bytes) == (True, number_of_parameters(root / "plain"))


def check_numbers(found: CheckpointDifference, path: str, before: torch.Tensor, after: torch.Tensor) -> None:
    (one,) = found.changed
    difference = after.double() - before.double()
    assert one.path == path
    assert one.changed == int((difference != 0).sum())
    assert one.max_abs == float(difference.abs().max())
    expected = float(difference.square().mean().sqrt() / before.double().square().mean().sqrt())
    assert one.relative_rms == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("side", ["plain", "plain-orbax"])
def test_the_numbers_are_those_of_torch(root: Path, tmp_path: Path, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of a few rows too, of which most are equal byte by byte."""
    tensor, path = "head.weight", "head"
    before = load_file(next(file for file in root.joinpath("plain").iterdir() if tensor in _names(file)))[tensor]

    def edit(values: torch.Tensor) -> torch.Tensor:
        values[7] *= 3
        values[200, 5:9] -= 0.25
        return values

    other = edited(root / "plain", tmp_path / "other", tensor, edit)
    for elements in (difference._ELEMENTS, 128 * before.shape[1]):
        monkeypatch.setattr(difference, "_ELEMENTS", elements)
        found = compare_checkpoints(root / side, other)
        check_numbers(found, path, before, edit(before.clone()))
        assert not found.equal
        assert found.equal_bytes == number_of_parameters(root / "plain") - 1


def _names(file: Path) -> set[str]:
    return set(load_file(file)) if file.suffix == ".safetensors" else set()


def test_the_expert_is_named(root: Path, tmp_path: Path) -> None:
    def edit(codes: torch.Tensor) -> torch.Tensor:
        codes[1, 2] ^= 0x11
        return codes

    other = edited(root / "hf", tmp_path / "other", "layers.2.ffn.experts.3.w2.weight", edit)
    for first in (root / "hf", root / "float32"):
        (one,) = compare_checkpoints(first, other).changed
        assert (one.path, one.experts) == ("layers.2.ffn.experts.w2", (3,))
        assert 1 <= one.changed <= 2


def test_other_codes_for_the_same_numbers(root: Path, tmp_path: Path) -> None:
    """Zeros under another scale: other bytes, the same values."""
    name = "layers.1.attn.wq_a"
    zeros = edited(root / "hf", tmp_path / "zeros", f"{name}.weight", lambda codes: torch.zeros_like(codes))
    other = edited(
        zeros, tmp_path / "other", f"{name}.scale", lambda scale: (scale.view(torch.uint8) + 1).view(scale.dtype)
    )
    found = compare_checkpoints(zeros, other)
    same = "FP8, scales float8_e8m0fnu"
    assert (found.equal, found.stored_otherwise) == (True, (StoredOtherwise(path=name, stored=(same, same)),))
    # The sign of a zero is another byte, and no other value.
    minus = edited(
        zeros, tmp_path / "minus", f"{name}.weight", lambda codes: (codes.view(torch.uint8) | 0x80).view(codes.dtype)
    )
    assert [one.path for one in compare_checkpoints(zeros, minus).stored_otherwise] == [name]


def test_what_is_no_number(root: Path, tmp_path: Path) -> None:
    def edit(values: torch.Tensor) -> torch.Tensor:
        values[3] = math.nan
        return values

    nan = edited(root / "plain", tmp_path / "nan", "norm.weight", edit)
    (one,) = compare_checkpoints(root / "plain", nan).changed
    assert (one.changed, one.max_abs, one.relative_rms) == (1, math.inf, math.inf)
    assert compare_checkpoints(nan, nan).equal
    document = compare_checkpoints(nan, root / "plain").to_json()
    assert json.loads(json.dumps(document, allow_nan=False))["changed"][0]["max_abs"] == "inf"


def test_what_only_one_has_and_other_shapes(root: Path, tmp_path: Path) -> None:
    hf_to_orbax(root / "hf", tmp_path / "some", layers=[1, 3])
    found = compare_checkpoints(root / "hf", tmp_path / "some")
    assert not found.equal
    assert {path.split(".")[1] for path in found.gone if path.startswith("layers.")} == {"0", "2"}
    assert not found.added
    assert compare_checkpoints(tmp_path / "some", root / "hf").added == found.gone
    assert compare_checkpoints(root / "hf", tmp_path / "some", layers=[1]).equal
    with pytest.raises(UsageError, match="some: holds the layers 1, 3, not 2"):
        compare_checkpoints(root / "hf", tmp_path / "some", layers=[1, 2])
    write_checkpoint(tmp_path / "words", tiny_config(vocab_size=200))
    found = compare_checkpoints(root / "hf", tmp_path / "words")
    assert [one.path for one in found.changed if one.shapes[0] != one.shapes[1]][:2] == ["embed", "head"]
    assert found.config == ("vocab_size: 96 in the first, 200 in the second",)


def test_what_is_no_checkpoint(root: Path, tmp_path: Path) -> None:
    golden = Path(golden_package.__file__).parent / "data" / "tiny"
    with pytest.raises(BadInput, match="a golden, not a checkpoint"):
        compare_checkpoints(root / "hf", golden)
    (tmp_path / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(BadInput, match="not a checkpoint written by dsv4"):
        compare_checkpoints(tmp_path, root / "hf")


def test_the_command(root: Path, tmp_path: Path) -> None:
    other = edited(root / "hf", tmp_path / "other", "layers.0.attn_norm.weight", lambda values: values * 2)

    def run(*words: object, code: int) -> str:
        result = CliRunner().invoke(app, ["diff", *map(str, words)])
        assert result.exit_code == code, result.output
        return result.stdout

    assert "158 parameters equal byte by byte" in run(root / "hf", root / "source", code=0)
    out = run(root / "hf", other, code=1)
    assert "layers.0.attn_norm  100.0%" in out
    assert "1 changed" in out
    assert "158 parameters" not in out
    run(root / "hf", other, "--layers", "1-3", code=0)
    document = json.loads(run(other, root / "hf", "--json", "-", code=1))
    assert [one["relative_rms"] for one in document["changed"]] == [0.5]
