"""The demo's checkpoint and its committed golden."""

from __future__ import annotations

from pathlib import Path

import pytest

import dsv4_convert.golden as golden_package
from dsv4_convert.convert import Storage, hf_to_orbax
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small published-format checkpoint that the committed golden was recorded from."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    write_checkpoint(folder, tiny_config(), seed=0)
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """The committed golden."""
    return Path(golden_package.__file__).parent / "data" / "tiny"


@pytest.fixture(scope="session")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint in float32, every leaf one plain array on disk."""
    out = tmp_path_factory.mktemp("plain") / "orbax"
    hf_to_orbax(tiny, out, storage=Storage.FLOAT32)
    return out
