"""The generator: the same bytes everywhere, weights that let every fault show."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4_convert.checkpoint import open_checkpoint
from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.golden.synthetic import (
    Form,
    dspark_config,
    make_checkpoint,
    random_architecture,
    tiny_config,
    write_checkpoint,
)
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.coverage import Stored, resolve

ROOT = Path(__file__).parents[2]


def _digest(folder: Path) -> str:
    shards = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256(b"".join(shard.read_bytes() for shard in shards)).hexdigest()


@pytest.mark.parametrize(
    ("golden", "made"),
    [
        ("golden/data/tiny", {}),
        ("golden/data/tiny-v4.1", {"model": "v4.1"}),
        ("docs/examples/maxtext/golden", {"config": ROOT / "docs/examples/maxtext/config.json"}),
    ],
)
def test_the_same_bytes_everywhere(tmp_path: Path, golden: str, made: dict[str, Any]) -> None:
    """The committed goldens were recorded from these very bytes; their manifests have the hash of every shard."""
    from dsv4_convert.golden.archive import open_golden

    make_checkpoint(tmp_path / "tiny", **made)
    recorded = open_golden(ROOT / golden).manifest.request.source.files
    assert recorded
    for name, digest in recorded.items():
        assert hashlib.sha256((tmp_path / "tiny" / name).read_bytes()).hexdigest() == digest, name


def test_seed_and_form_change_the_bytes(tmp_path: Path) -> None:
    for name, seed, form in (("a", 0, "fp4"), ("b", 0, "fp4"), ("c", 1, "fp4"), ("d", 0, "fp8"), ("e", 0, "bf16")):
        write_checkpoint(tmp_path / name, tiny_config(), seed=seed, form=form)
    a, b, *others = (_digest(tmp_path / name) for name in "abcde")
    assert a == b
    assert len({a, *others}) == 4


@pytest.mark.parametrize(
    ("form", "config"),
    [("fp4", tiny_config()), ("fp8", tiny_config()), ("bf16", tiny_config()), ("fp4", dspark_config())],
)
def test_every_tensor_is_known_and_distinct(tmp_path: Path, form: Form, config: dict[str, Any]) -> None:
    write_checkpoint(tmp_path / "hf", config, form=form)
    with open_checkpoint(tmp_path / "hf") as checkpoint:
        stored = {name: Stored(info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
        resolve(stored, Config.from_hf(checkpoint.config))
        contents = [bytes(checkpoint.read_bytes(name)) for name, info in checkpoint.tensors.items() if info.nbytes > 4]
        assert len(contents) - len(set(contents)) <= len(contents) // 10, "only tiny scale tensors may coincide"
        for name in checkpoint.tensors:
            array = checkpoint.read(name)
            if "norm" in name:
                values = array.astype(np.float32)
                assert (values != 1).mean() > 0.9, name
                assert 0.05 < values.std() < 0.6, name
            if name.endswith(("attn_sink", "gate.bias", "ape", "_base")):
                assert (array != 0).mean() > 0.9, name
            if name.endswith("tid2eid"):
                assert all(len(set(row)) == len(row) for row in array.tolist()), name
                assert array.max() < 6


def test_only_the_shards_of_chosen_layers(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "all", tiny_config())
    write_checkpoint(tmp_path / "some", tiny_config(), layers=[2], mtp=False)
    with open_checkpoint(tmp_path / "all") as whole, open_checkpoint(tmp_path / "some") as part:
        assert {name for name in whole.tensors if name.startswith("layers.2.")} <= set(part.tensors)
        assert not any(name.startswith(("layers.1.", "mtp.")) for name in part.tensors)
        for name in part.tensors:
            assert bytes(whole.read_bytes(name)) == bytes(part.read_bytes(name)), name


@pytest.mark.parametrize("seed", range(100))
def test_random_architectures_are_valid(seed: int) -> None:
    assert Config.from_hf(random_architecture(seed)).num_hidden_layers >= 1


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        write_checkpoint(tmp_path, tiny_config())


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{", '{"a": 1, "a": 2}', None])
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadInput, match=r"config\.json"):
        make_checkpoint(tmp_path / "made", config=tmp_path / "config.json")
    assert not list(tmp_path.glob("made*"))
