"""The model on a mesh of simulated devices is the model on one."""

from __future__ import annotations

from ..processes import end, start


def test_sharded_and_scanned_it_is_the_same_model() -> None:
    """In a process of its own, because the number of devices is fixed when JAX starts."""
    ended = end(start(["-m", "tests.model.sharded"], devices=8), timeout=600)
    assert ended.code == 0, ended.err[-3000:]
    assert "agrees on 2" in ended.out
