"""A verdict says what the run says nothing about; required, it is a failure unless the source proves it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsv4_convert.golden.archive import open_golden
from dsv4_convert.parity.report.junit import junit
from dsv4_convert.parity.report.words import next_steps, verdict
from dsv4_convert.parity.run import ParityOptions, run_parity

from .test_run import planted

Array = np.ndarray
#: Tokens that the committed golden's prompt does not have.
UNUSED = [15, 57, 61, 89]
_REQUIRED = ParityOptions(layers=None, taps=["embed", "ffn.gate.*", "logits"], require_coverage=True)


def _zero_rows(array: Array) -> Array:
    changed = array.copy()
    changed[UNUSED] = 0
    return changed


def test_the_golden_leaves_what_these_tests_say(golden: Path) -> None:
    opened = open_golden(golden)
    assert sorted(set(range(opened.config.vocab_size)) - set(np.unique(opened.tokens).tolist())) == UNUSED


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("mtp.0.attn.wq_a", lambda array: array * 0),
        ("mtp.0.ffn.experts.w2", lambda array: array * -3),
    ],
    ids=["stage", "experts of a stage"],
)
def test_faults_that_no_token_reaches(
    plain: Path, tiny: Path, golden: Path, tmp_path: Path, path: str, change: Callable[[Array], Array]
) -> None:
    faulty = planted(plain, tmp_path / "orbax", path, change)
    said = run_parity(faulty, golden, ParityOptions(taps=_REQUIRED.taps))
    assert said.passed
    assert "This run says nothing about the draft stage" in verdict(said)
    assert "4 of 96 rows of the embedding and tid2eid, decoding from a cache." in verdict(said)
    command = f"`dsv4 verify {faulty} --against SOURCE` compares the weights that this run does not use"
    assert command in verdict(said)
    assert command in next_steps(said)[0]
    required = run_parity(faulty, golden, _REQUIRED)
    assert not required.passed
    assert "but the run does not reach everything" in verdict(required)
    assert "Give `--against SOURCE`" in verdict(required)
    assert 'name="unused weights"' in junit(required)
    compared = run_parity(faulty, golden, _REQUIRED, against=tiny)
    assert not compared.passed
    assert compared.unchecked is not None
    assert {difference.path for difference in compared.unchecked.differing} == {path}
    assert f"{path}" in verdict(compared)
    assert "Convert again" in verdict(compared)


@pytest.mark.parametrize("path", ["embed", "layers.1.ffn.gate.tid2eid"])
def test_rows_that_no_token_reaches_are_other_weights(
    plain: Path, tiny: Path, golden: Path, tmp_path: Path, path: str
) -> None:
    faulty = planted(plain, tmp_path / "orbax", path, _zero_rows)
    said = run_parity(faulty, golden, ParityOptions(taps=_REQUIRED.taps))
    assert said.agrees
    assert not said.passed
    assert f"other weights than the golden's, in 1 parameter ({path})" in verdict(said)
    compared = run_parity(faulty, golden, _REQUIRED, against=tiny)
    assert compared.unchecked is not None
    assert {difference.path for difference in compared.unchecked.differing} == {path}


def test_a_right_conversion_passes_with_its_source(plain: Path, tiny: Path, golden: Path) -> None:
    report = run_parity(plain, golden, _REQUIRED, against=tiny)
    assert report.passed, verdict(report)
    assert "Weights that it does not use are those of the source, bit by bit." in verdict(report)
    assert "--against SOURCE" not in verdict(report)


def test_the_source_itself_needs_no_proof(tiny: Path, golden: Path) -> None:
    """Nothing was converted; but the verdict says the same of what was not run."""
    report = run_parity(None, golden, _REQUIRED, source=tiny)
    assert report.passed, verdict(report)
    assert "This run says nothing about the draft stage" in verdict(report)
    assert "dsv4 verify" not in verdict(report)


def test_what_was_left_out_on_purpose_is_said_and_does_not_count(plain: Path, golden: Path) -> None:
    report = run_parity(plain, golden, ParityOptions(layers=[2], taps=["ffn.gate.*"], require_coverage=True))
    assert report.passed, verdict(report)
    assert "This run says nothing about the draft stage, 3 of the layers, the embedding, the output head, 33 taps" in (
        verdict(report)
    )
