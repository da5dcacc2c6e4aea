"""The bar of the project: random architectures, every tap of every layer, against transformers."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest

from dsv4_convert.config import Config
from dsv4_convert.convert import Storage, hf_to_orbax
from golden.recorder import record
from golden.synthetic import random_architecture, write_checkpoint
from parity.metrics import Verdict
from parity.report import Report
from parity.run import run
from parity.tolerances import TOLERANCES, Mode, Tolerance, tolerance

#: Lengths around every boundary: one token, a CSA block, an HCA block, two of them, and longer than any window.
LENGTHS = (1, 3, 4, 5, 127, 128, 129, 257, 301)
CASES = 36


@pytest.mark.parametrize("case", range(CASES))
def test_every_tap_of_a_random_architecture(case: int, tmp_path: Path) -> None:
    draw = Random(case)
    length, batch = LENGTHS[case % len(LENGTHS)], draw.choice((1, 3))
    form, storage = draw.choice(("fp4", "fp8", "bf16")), draw.choice((Storage.FLOAT32, Storage.SOURCE))
    if form == "fp4" and draw.random() < 0.5:
        storage = Storage.BFLOAT16  # exact there, and only there
    raw = random_architecture(case)
    write_checkpoint(tmp_path / "hf", raw, seed=case, form=form)
    tokens = np.random.default_rng(case).integers(0, raw["vocab_size"], (batch, length)).astype(np.int32)
    record(tmp_path / "hf", tmp_path / "golden", tokens=tokens)
    hf_to_orbax(tmp_path / "hf", tmp_path / "orbax", storage=storage)

    for mode in Mode:
        report = run(tmp_path / "orbax", tmp_path / "golden", mode=mode)
        assert report.passed, f"{mode}: {report.sentence}\n{raw}"
        _covers(report, Config.from_hf(raw), length)


def _covers(report: Report, config: Config, length: int) -> None:
    """Nothing was left out, and every choice is the golden's, but for ties between equal scores."""
    by_name = {tap.name: tap for tap in report.taps}
    assert "logits" in by_name
    assert {tap.layer for tap in report.taps} == {None, *range(config.num_hidden_layers)}
    for tap in report.taps:
        if tap.verdict is Verdict.EMPTY:
            assert "compressor" in tap.name or "indexer" in tap.name
            assert length < 128
        if tap.flips is not None:
            assert tap.flips.tokens == tap.flips.ties


def test_the_bars_are_those_that_were_set() -> None:
    """And hold as they are at the widths drawn above; only much wider models get more."""
    assert {
        Mode.ISOLATED: Tolerance(atol=1e-5, rtol=1e-5),
        Mode.CUMULATIVE: Tolerance(atol=1e-4, rtol=1e-4),
    } == TOLERANCES
    for case in range(CASES):
        config = Config.from_hf(random_architecture(case))
        assert [tolerance(mode, config) for mode in Mode] == [TOLERANCES[mode] for mode in Mode]
    flash = Config.from_hf(random_architecture(0) | {"hidden_size": 4096})
    assert tolerance(Mode.ISOLATED, flash).atol == pytest.approx(1e-5 * 8**0.5)
