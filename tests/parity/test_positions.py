"""Far positions: goldens of prompts that stand there without the tokens before them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.golden.archive import Golden
from dsv4_convert.golden.noise import MODES
from dsv4_convert.golden.recorder import RecordingOptions, record
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.parity.diff import diff
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.run import ParityOptions, ParityRun
from dsv4_convert.weights.published import PublishedWeights

TOKENS = np.random.default_rng(3).integers(0, 96, (1, 40)).astype(np.int32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("far") / "hf"
    write_checkpoint(folder, tiny_config(max_position_embeddings=1 << 20), seed=0)
    return folder


def _recorded(source: Path, out: Path, first_position: int) -> Golden:
    return record(source, out, RecordingOptions(tokens=TOKENS, noise=["float32"], first_position=first_position))


@pytest.mark.parametrize("first", [65_521, (1 << 20) - 40], ids=["65k", "last"])
def test_far_positions_agree_and_near_ones_would_not(source: Path, tmp_path: Path, first: int) -> None:
    """Around the end of the original context, and up to the last position that there is."""
    golden = _recorded(source, tmp_path / "golden", first)
    weights = PublishedWeights.open(source)
    report = ParityRun(weights, golden, ParityOptions(modes=MODES)).run()
    assert report.passed, [result for result in report.taps if result.verdict is Verdict.FAIL]

    run = ParityRun(weights, golden, ParityOptions(modes=MODES[:1], layers=[1]))
    run._forward._first_position -= 16
    failed = [result.name for result in run.run().taps if result.verdict is Verdict.FAIL]
    assert failed[0] == "layers.1.attn.q_rope"

    # A manifest with other positions does not fit the recorded arrays.
    request = dataclasses.replace(golden.manifest.request, first_position=first - 16)
    golden.manifest = dataclasses.replace(golden.manifest, request=request)
    with pytest.raises(BadInput, match="not those that were recorded of this prompt"):
        ParityRun(weights, golden, ParityOptions(modes=MODES[:1], layers=[1])).run()


def test_positions_beyond_the_models_limit_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a prompt of 40 tokens, but max_position_embeddings leaves 39"):
        _recorded(source, tmp_path / "golden", (1 << 20) - 39)
    with pytest.raises(UsageError, match="expected 0 or more"):
        _recorded(source, tmp_path / "golden", -1)
    assert not list(tmp_path.iterdir())


def test_goldens_of_other_positions_are_not_compared(source: Path, tmp_path: Path) -> None:
    one, other = (_recorded(source, tmp_path / str(first), first) for first in (0, 50))
    with pytest.raises(UsageError, match="recorded from other positions"):
        diff(one, other)


def test_goldens_of_other_steps_are_not_compared(source: Path, tmp_path: Path) -> None:
    """Index scores of entries that came later are not there in one of them."""
    one, other = (
        record(source, tmp_path / str(decode), RecordingOptions(tokens=TOKENS[:, :9], noise=["float32"], decode=decode))
        for decode in (0, 2)
    )
    with pytest.raises(UsageError, match="recorded from other numbers of tokens one by one"):
        diff(one, other)
