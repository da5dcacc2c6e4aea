"""Coverage of a prompt, for architectures where it is plain to see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dsv4_convert.golden.archive import Golden
from dsv4_convert.golden.prompt_coverage import prompt_coverage
from dsv4_convert.golden.recorder import RecordingOptions, record
from dsv4_convert.golden.synthetic import dspark_config, tiny_config, write_checkpoint


def _golden(folder: Path, length: int) -> Golden:
    write_checkpoint(folder / "hf", tiny_config(), seed=0)
    tokens = np.random.default_rng(0).integers(0, 96, (1, length)).astype(np.int32)
    return record(folder / "hf", folder / "golden", RecordingOptions(tokens=tokens, noise=()))


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
        found = prompt_coverage(golden, layer).missed
        assert len(found) == len(expected), found
        for words, sentence in zip(expected, found, strict=True):
            assert words in sentence


@pytest.mark.parametrize(("length", "full"), [(17, False), (18, True)])
def test_a_stage_knows_one_token_less_than_a_layer(tmp_path: Path, length: int, full: bool) -> None:
    write_checkpoint(tmp_path / "hf", dspark_config(), seed=0)
    tokens = np.random.default_rng(0).integers(0, 96, (1, length)).astype(np.int32)
    options = RecordingOptions(tokens=tokens, layers=(0,), stages=True, noise=())
    golden = record(tmp_path / "hf", tmp_path / "golden", options)
    assert prompt_coverage(golden, 0).missed == ()
    missed = prompt_coverage(golden, golden.config.num_hidden_layers).missed
    assert missed == (() if full else ("the window of 16 tokens never drops one",))


def test_experts_are_counted(tmp_path: Path) -> None:
    golden = _golden(tmp_path, 3)
    for layer in golden.layers:
        found = prompt_coverage(golden, layer)
        assert (found.experts, found.of) == (len(set(golden.read(f"layers.{layer}.ffn.gate.experts").ravel())), 6)
        assert not found.complete
