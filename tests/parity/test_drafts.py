"""Goldens and parity of DSpark's stages: both programs, both modes, tokens one by one, and every report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dsv4_convert.golden.archive import Golden
from dsv4_convert.golden.noise import MODES, Mode
from dsv4_convert.golden.recorder import RecordingOptions, record
from dsv4_convert.golden.synthetic import write_checkpoint
from dsv4_convert.parity.report.data import ParityReport
from dsv4_convert.parity.report.words import verdict
from dsv4_convert.parity.run import ParityOptions, run_parity

from .faults.fault import DRAFTING

TOKENS, DECODE = 40, 3
IDS = np.random.default_rng(3).integers(0, DRAFTING["vocab_size"], (2, TOKENS)).astype(np.int32)
OPTIONS = RecordingOptions(tokens=IDS, stages=True, decode=DECODE)
STAGES = (2, 3, 4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drafts") / "hf"
    write_checkpoint(folder, DRAFTING, seed=0)
    return folder


@pytest.fixture(scope="module")
def golden(source: Path) -> Golden:
    return record(source, source.parent / "golden", OPTIONS)


@pytest.fixture(scope="module")
def report(source: Path, golden: Golden) -> ParityReport:
    """Everything is compared, in both modes and both programs."""
    return run_parity(None, golden.path, ParityOptions(modes=MODES, detail=True), source=source)


def test_the_stages_agree_in_both_programs_and_modes(golden: Golden, report: ParityReport) -> None:
    assert report.passed, verdict(report)
    assert report.layers == golden.layers == (0, 1, *STAGES)
    assert report.model is not None
    assert report.model.agrees
    for of in (report, report.model):
        for mode in MODES:
            compared = {result.key for result in of.taps if result.mode is mode}
            missing = {str(key) for key in golden.keys if key.stage is not None and key not in compared}
            fed = {"mtp.0.targets", *(f"mtp.{stage}.{name}" for stage in (1, 2) for name in ("streams", "context"))}
            assert missing == (fed if mode is Mode.ISOLATED else set()), "which are the golden's own"
