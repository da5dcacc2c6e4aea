"""What a prompt reaches, by architectures where it is plain to see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dsv4_convert.golden.archive import Golden
from dsv4_convert.golden.reach import reach
from dsv4_convert.golden.recorder import record
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint


def _golden(folder: Path, length: int) -> Golden:
    write_checkpoint(folder / "hf", tiny_config(), seed=0)
    tokens = np.random.default_rng(0).integers(0, 96, (1, length)).astype(np.int32)
    return record(folder / "hf", folder / "golden", tokens=tokens, noise=())


@pytest.mark.parametrize(
    ("length", "missed"),
    [
        (3, {0: ["window of 16"], 1: ["window", "no block of 4"], 2: ["window", "no block of 128"]}),
        (
            7,
            {
                0: ["window"],
                1: ["window", "a single block of 4", "never has to choose: 1 entries, of which it may keep 5"],
            },
        ),
        (23, {0: [], 1: ["never has to choose: 5 entries"], 2: ["no block of 128"]}),
        (24, {0: [], 1: [], 2: ["no block of 128"]}),
        (127, {2: ["no block of 128"]}),
        (128, {0: [], 1: [], 2: [], 3: []}),
    ],
)
def test_operations_that_are_not_reached(tmp_path: Path, length: int, missed: dict[int, list[str]]) -> None:
    golden = _golden(tmp_path, length)
    for layer, expected in missed.items():
        found = reach(golden, layer).missed
        assert len(found) == len(expected), found
        for words, sentence in zip(expected, found, strict=True):
            assert words in sentence


def test_experts_are_counted(tmp_path: Path) -> None:
    golden = _golden(tmp_path, 3)
    for layer in golden.layers:
        found = reach(golden, layer)
        assert (found.experts, found.of) == (len(set(golden.read(f"layers.{layer}.ffn.gate.experts").ravel())), 6)
        assert not found.complete
