"""The model on a mesh of simulated devices is the model on one."""

from __future__ import annotations

import pytest

from ..processes import end, start
from .sharded import MESHES


@pytest.mark.parametrize("mesh", [0, pytest.param(1, marks=pytest.mark.thorough)], ids=map(str, MESHES))
@pytest.mark.parametrize("model", ["v4", "v4.1"])
def test_sharded_and_scanned_it_is_the_same_model(model: str, mesh: int) -> None:
    """In a process of its own, because the number of devices is fixed when JAX starts."""
    ended = end(start(["-m", "tests.model.sharded", model, str(mesh)], devices=8), timeout=600)
    assert ended.code == 0, ended.err[-3000:]
    assert f"{model} agrees on {MESHES[mesh]}" in ended.out
