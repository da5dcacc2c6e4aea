"""Parity of V4.1's draft stages: both programs, both modes, planted faults, and what they read of the backbone."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest

from dsv4_convert.golden.layout import is_fed
from dsv4_convert.golden.noise import MODES, Mode
from dsv4_convert.parity.programs import ModelOptions
from dsv4_convert.parity.report.words import verdict
from dsv4_convert.parity.run import ParityOptions, ParityRun
from dsv4_convert.spec.v41.config import V41Config

from .faults.catalogue import CATALOGUE_V41
from .faults.drafts_v41 import DRAFT_FAULTS_V41, OWN, WRONG_TARGETS
from .faults.fault import DRAFTS, Patient, examine, patient, uncompiled

FIRST, MIDDLE, LAST = DRAFTS
#: Faults of V4's stages, planted here too; ``python -m benchmarks.faults --model v4.1`` plants all.
SAMPLE = (
    "v4.1, mtp.0: targets in another order",
    "v4.1, mtp.1: window one too short",
    "v4.1, mtp.2: Markov tables exchanged",
    "v4.1, mtp.2: confidence of the normed streams",
)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Patient:
    """Its golden is of the stand-in for the published code."""
    return patient(tmp_path_factory.mktemp("v41_drafts"), "v4.1 drafting")


def test_every_tap_agrees_in_both_modes(healthy: Patient) -> None:
    with uncompiled():
        report = ParityRun(healthy.held, healthy.golden, ParityOptions(modes=MODES)).run()
    assert report.passed, verdict(report)
    assert not any(covered.missed for covered in report.prompt_coverage), "a fault in what is not reached cannot show"
    for mode in MODES:
        own = {key for key in healthy.golden.keys if not is_fed(key, mode)}
        assert {result.key for result in report.taps if result.mode is mode} == own
    fed = {key.tap.name for key in healthy.golden.keys if key.layer in DRAFTS and is_fed(key, Mode.ISOLATED)}
    assert fed == {"targets", "streams", "pre", "context"}


@pytest.mark.parametrize("name", [*(fault.name for fault in OWN), *SAMPLE])
def test_a_planted_fault_is_named(healthy: Patient, name: str) -> None:
    fault = CATALOGUE_V41[name]
    assert fault.layer is not None
    layers = [fault.layer] if fault.runs is None else range(fault.layer + 1)
    with uncompiled():
        report = examine(healthy, fault, layers=layers, **fault.options)
    assert fault.named_by(report), verdict(report)


@pytest.mark.parametrize("read", WRONG_TARGETS)
def test_other_streams_of_a_target_show_from_the_tokens_on(
    healthy: Patient, read: Callable[[V41Config, int], str]
) -> None:
    options = ParityOptions(layers=[0, 1, FIRST], modes=[Mode.CUMULATIVE])
    with patch.object(V41Config, "draft_tap", read), uncompiled():
        report = ParityRun(healthy.held, healthy.golden, options).run()
    assert report.first_diverging is not None
    assert report.first_diverging.name == "mtp.0.targets"


@pytest.mark.parametrize(
    ("layers", "model"),
    [
        ([LAST], ModelOptions(weights="expanded")),
        pytest.param([FIRST, MIDDLE], ModelOptions(weights="source", chunk=16), marks=pytest.mark.thorough),
    ],
)
def test_the_compiled_stages_agree(healthy: Patient, layers: list[int], model: ModelOptions) -> None:
    report = ParityRun(healthy.source(), healthy.golden, ParityOptions(layers=layers), model=model).run()
    assert report.passed, verdict(report)
    compared = {result.key for result in report.taps}
    assert compared == {key for key in healthy.golden.keys if key.layer in layers and not is_fed(key, Mode.ISOLATED)}


def test_the_catalogue_has_what_the_stages_have() -> None:
    assert len(DRAFT_FAULTS_V41) >= 60
    assert {fault.layer for fault in DRAFT_FAULTS_V41} == set(DRAFTS)
