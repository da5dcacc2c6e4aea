"""Two goldens against each other: the same prompt recorded from equal, slightly different and other weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dsv4_convert.errors import UsageError
from dsv4_convert.golden.archive import Golden, open_golden
from dsv4_convert.golden.recorder import record
from dsv4_convert.golden.synthetic import Form, tiny_config, write_checkpoint
from dsv4_convert.parity.diff import diff

TOKENS = np.random.default_rng(0).integers(0, 96, (1, 40)).astype(np.int32)


def _golden(folder: Path, *, seed: int = 0, form: Form = "fp4", tokens: np.ndarray = TOKENS) -> Golden:
    write_checkpoint(folder / "hf", tiny_config(), seed=seed, form=form)
    return record(folder / "hf", folder / "golden", tokens=tokens, noise=["float32"])


def test_recorded_twice_they_are_equal(tmp_path: Path, golden: Path) -> None:
    first, second = _golden(tmp_path / "a"), _golden(tmp_path / "b")
    found = diff(first, second)
    assert found.agrees
    assert (found.equal, found.differing, found.only, found.recorded) == (len(first.names), (), (), ())
    part = record(tmp_path / "a" / "hf", tmp_path / "part", tokens=TOKENS, layers=[1], noise=["float32"])
    assert "layers.0.attn.q" in diff(first, part).only
    with pytest.raises(UsageError, match="recorded from other tokens"):
        diff(first, open_golden(golden))


def test_other_weights_are_beyond_the_noise(tmp_path: Path) -> None:
    found = diff(_golden(tmp_path / "a"), _golden(tmp_path / "b", seed=1))
    assert not found.agrees
    assert found.beyond[0].name == "embed"
    assert any(line.startswith("source.files") for line in found.lines())
    assert found.to_json()["beyond_noise"][0] == "embed"


def test_another_order_of_summation_is_within_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if recorded on another machine: one thread, and the head in pieces."""
    import torch

    from dsv4_convert.golden.references import streamed

    first = _golden(tmp_path / "a")
    threads = torch.get_num_threads()
    monkeypatch.setattr(streamed, "HEAD_ROWS", 17)
    torch.set_num_threads(1)
    try:
        second = _golden(tmp_path / "b")
    finally:
        torch.set_num_threads(threads)
    found = diff(first, second)
    assert found.agrees
    assert not found.only
