"""Negative controls: every fault of the catalogue is found, and named at its own layer and operation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsv4_convert.golden.noise import Mode
from dsv4_convert.golden.synthetic import write_checkpoint
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.words import summarized, verdict
from dsv4_convert.parity.run import ParityOptions, ParityRun
from dsv4_convert.parity.tolerances import LIMITS, UNIT
from dsv4_convert.show.units import number_of
from dsv4_convert.weights.published import PublishedWeights

from .faults.catalogue import CATALOGUE
from .faults.drafts import REPEATED
from .faults.fault import CSA, MAIN, Arrays, Fault, Held, Patient, examine, patient
from .faults.scales import EXPERT, SCALES


class Patients(dict[str, Patient]):
    """Models by name, each of them made when a test asks for it: other processes run the other tests."""

    def __init__(self, make: Callable[[str], Patient]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, name: str) -> Patient:
        self[name] = self._make(name)
        return self[name]


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory) -> Patients:
    """The healthy models that faults are planted in; the wide one shows those that are smaller than rounding."""
    return Patients(
        lambda name: patient(tmp_path_factory.mktemp(name), name, noise=UNIT if name == "wide" else ["float32"])
    )


@pytest.mark.parametrize("model", ["main", "many", "wide", "staged", "drafting"])
def test_the_healthy_models_pass(patients: Patients, model: str) -> None:
    report = ParityRun(patients[model].held, patients[model].golden).run()
    assert report.passed, verdict(report)
    assert not report.localizations
    if model in ("main", "staged"):
        assert not report.uncovered, "a fault in what is not reached cannot show"
    if model == "drafting":
        assert not any(covered.missed for covered in report.prompt_coverage), "a block of 5 tokens reaches few experts"
    if model in ("staged", "drafting"):
        assert report.unchecked is not None
        assert report.unchecked.stages == 0


def test_the_catalogue_is_large_and_covers_every_kind() -> None:
    assert len(CATALOGUE) >= 80
    assert {fault.kind for fault in CATALOGUE.values()} == {"weights", "decoding", "names table", "config", "code"}


#: Faults that are planted in one of DSpark's stages by every run of the tests, and in the others by the thorough one.
_AGAIN = {fault.name for fault in REPEATED}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough) if name in _AGAIN else name for name in CATALOGUE]
)
def test_a_planted_fault_is_named(patients: Patients, name: str) -> None:
    fault = CATALOGUE[name]
    # Every other layer has the weights, inputs and programs with which it passes in the healthy model; the tests below
    # run the layers before the fault as well, and the benchmark all of them.
    report = examine(patients[fault.model], fault, layers=None if fault.layer is None else [fault.layer])
    assert not report.passed
    assert report.first_diverging is not None
    assert report.first_diverging.name == fault.full_tap
    assert report.first_wrong is not None
    assert report.first_wrong.name == fault.full_tap, "the localization names the same operation"
    assert fault.alters(report), "in bfloat16 any of them may be named"
    failing = {tap.layer for tap in report.taps if tap.verdict is Verdict.FAIL}
    assert failing <= {fault.layer, *fault.also}, "other layers are clean"
    where = "Model level" if fault.layer is None else f"Layer {fault.layer}"
    where = f"Stage {fault.full_tap[:5]}" if fault.full_tap.startswith("mtp.") else where
    said = summarized(report)
    # Weights that changed are said first, as the golden knows its own.
    others = f"other weights than the golden's, in {number_of(len(report.other_weights or ()), 'parameter')} ("
    headline, named = said.headline, f"{fault.full_tap} is the first tap that diverges; "
    assert headline.startswith(f"FAIL: {others if report.other_weights else named}")
    assert named in headline
    assert [label for label, _ in said.lines] == ["Where", "Cause", "Evidence", "Next", "Programs"]
    lines = dict(said.lines)
    assert lines["Where"].startswith(f"{where}, {report.first_diverging.meaning}; ")
    alone = "Fed with the golden's own inputs, it is wrong by itself."
    assert alone in lines["Cause"] or f"inputs, {fault.full_tap}" in lines["Cause"]


@pytest.fixture(scope="module")
def compact(patients: Patients) -> Patients:
    """The same models with compact goldens, which keep one token exactly."""
    return Patients(lambda name: patients[name].compacted())


@pytest.mark.parametrize("name", [*list(CATALOGUE)[::12], "hash table rounded through bfloat16"])
def test_a_compact_golden_names_it_as_well(compact: Patients, name: str) -> None:
    """From the tokens, by sketches and one exact token. The benchmark does it with every fault."""
    fault = CATALOGUE[name]
    report = examine(compact[fault.model], fault, layers=None if fault.layer is None else range(fault.layer + 1))
    assert report.modes == (Mode.CUMULATIVE,)
    assert report.first_diverging is not None
    assert report.first_wrong is not None
    assert report.first_diverging.name == report.first_wrong.name == fault.full_tap
    assert "All that is computed before it agrees, so the operation itself is wrong." in verdict(report)


def test_a_compact_golden_leads_to_the_expert_and_the_tensor(compact: Patients) -> None:
    patient = compact["main"]
    report = examine(patient, CATALOGUE["one expert missing its scale"], against=patient.source())
    assert "layers.2.ffn.experts.w1, expert 3 is not" in verdict(report)
    assert "Exactly the tokens that were sent to expert 3 are wrong." in verdict(report)


def test_two_faults_in_one_layer_are_both_found(patients: Patients) -> None:
    """The second lies behind the first, where everything is wrong already; the localization finds it all the same."""

    def both(arrays: dict[str, object]) -> None:
        for name in ("square wq_a transposed", "router experts rolled by one"):
            plant = CATALOGUE[name].arrays
            assert plant is not None
            plant(arrays)

    report = examine(patients["main"], Fault(name="both", layer=CSA, tap="attn.wq_a", arrays=both))
    (localization,) = report.localizations
    assert [result.short for result in localization.wrong] == ["attn.wq_a", "ffn.gate.logits"]
    assert len([tap for tap in report.taps if tap.verdict is Verdict.FAIL]) > 20


def test_the_layer_that_adds_the_error_is_named(patients: Patients) -> None:
    """Isolated and cumulative in one run: layer 1 adds, the layers after it inherit; the two parts make the whole."""
    report = examine(patients["main"], CATALOGUE["output groups of wo_a swapped"], modes=tuple(Mode))
    assert "Layer 1 adds error. Layers 2-3 inherit it and add none." in verdict(report)
    before, faulty, *after = report.error_splits
    assert before.added_noise < 4
    assert before.inherited == 0
    assert faulty.added > 0.05
    assert faulty.inherited < 1e-5
    for layer in after:
        assert layer.inherited > 0.05
        assert layer.added_noise < 4
        assert abs(layer.total - layer.inherited) <= layer.added * 1.001


def test_a_fault_in_cumulative_mode_alone_is_descended_to(patients: Patients) -> None:
    report = examine(patients["main"], CATALOGUE["router bias dropped"], modes=(Mode.CUMULATIVE,))
    assert report.first_wrong is not None
    assert report.first_wrong.name == "layers.3.ffn.gate.scores"
    assert [localization.layer for localization in report.localizations] == [3, None]
    assert not report.localizations[1].wrong, "the head only inherits"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("two experts swapped in w2", ["layers.2.ffn.experts.w2, expert 0 is not", "it holds expert 1"]),
        ("one expert missing its scale", ["layers.2.ffn.experts.w1, expert 3 is not", "Exactly the tokens that were"]),
        ("wkv and wgate of the compressor swapped", ["it holds layers.2.attn.compressor.wgate.weight"]),
        ("square wq_a transposed", ["layers.1.attn.wq_a is not", "it is the source's transpose"]),
        ("ape rolled by one token", ["it is the source's rows rolled by 1"]),
        ("Ca and Cb halves of wkv swapped", ["it is the source's rows rolled by 16"]),
        ("sinks left at zero", ["it is the source's place, but all zero"]),
        ("output groups of wo_a swapped", ["rows rolled by 16"]),
        ("wo_a as one matrix, groups interleaved", ["of 1,024 elements differ"]),
        ("rope in halves instead of interleaved", ["They use no weights: look at the configuration and the code."]),
        ("router matmul at default precision", ["Its weights (layers.3.ffn.gate.weight) are those of the source"]),
    ],
)
def test_with_the_source_at_hand_the_part_of_the_tensor_is_named(
    patients: Patients, name: str, expected: list[str]
) -> None:
    fault = CATALOGUE[name]
    sentence = verdict(examine(patients["main"], fault, against=patients["main"].source()))
    for words in expected:
        assert words in sentence


def test_without_the_source_it_says_how_to_bring_it(patients: Patients) -> None:
    lines = dict(summarized(examine(patients["main"], CATALOGUE["router bias dropped"])).lines)
    assert "It uses layers.3.ffn.gate.bias." in lines["Cause"]
    assert lines["Next"].startswith("Repeat with `--against SOURCE`")


@pytest.fixture(scope="module")
def wide(patients: Patients) -> Patient:
    """The model whose faults are smaller than rounding."""
    return patients["wide"]


#: One of each kind of operation, and of both ways in which experts are chosen; the benchmark plants all of them.
SMALL = (
    "layers.1.attn.wq_a times 1 + 2^-7",
    "layers.1.attn.wo_b times 1 + 2^-7",
    "layers.1.hc_ffn_fn times 1 + 2^-7",
    "layers.2.attn.wo_a times 1 + 2^-7",
    "layers.2.attn.compressor.ape times 1 + 2^-7",
    "layers.3.attn.indexer.compressor.ape times 1 + 2^-7",
    "layers.2.ffn.gate.weight times 1 + 2^-7",
    "layers.2.ffn.shared_experts.w1 times 1 + 2^-7",
    *(
        f"layers.{layer}.ffn.experts.w{part}, expert {EXPERT}, times 1 + 2^-7"
        for layer, part in ((1, 2), (2, 1), (2, 3))
    ),
    "head times 1 + 2^-7",
)


def test_a_healthy_model_in_bfloat16_passes(wide: Patient) -> None:
    report = ParityRun(wide.held, wide.golden, ParityOptions(dtype="bfloat16")).run()
    assert report.passed, verdict(report)
    assert {tap.name for tap in report.taps if tap.systematic is None} <= {
        tap.name for tap in report.taps if tap.flips is not None
    }


def test_the_limits_of_size_are_those_of_bfloat16(wide: Patient) -> None:
    """An error without a trend that float32's limits would let pass."""

    def plant(arrays: Arrays) -> None:
        path = "layers.1.attn.wq_a"
        signs = np.random.default_rng(0).choice([-1, 1], arrays[path].shape)
        arrays[path] = (arrays[path] * (1 + 2.0**-5 * signs)).astype(np.float32)

    fault = Fault(name="weights moved by eight roundings", layer=CSA, tap="attn.wq_a", arrays=plant)
    report = examine(wide, fault, layers=[CSA], dtype="bfloat16")
    assert fault.named_by(report), verdict(report)
    assert report.first_diverging is not None
    assert report.first_diverging.distance is not None
    noise = report.first_diverging.distance.noise
    assert noise.exceeded(report.limits)
    assert not noise.exceeded(LIMITS["float32"])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if fault.kind == "weights" else pytest.mark.thorough)
        for name, fault in CATALOGUE.items()
        if fault.legal
    ],
)
def test_a_legal_rounding_passes_in_bfloat16(wide: Patient, name: str) -> None:
    fault = CATALOGUE[name]
    report = examine(wide, fault, layers=None if fault.layer is None else [fault.layer], dtype="bfloat16")
    assert report.passed, verdict(report)


#: Found and named in bfloat16 at another operation of the same wrong parameter.
ELSEWHERE = ("hc_ffn_base rounded to bfloat16", "hc_ffn_scale rounded to bfloat16")


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_rounded_parameter_is_named_where_its_errors_have_one_trend(wide: Patient, name: str) -> None:
    fault = CATALOGUE[name]
    report = examine(wide, fault, layers=[fault.layer], dtype="bfloat16")
    assert fault.named_by(report), verdict(report)
    assert report.first_diverging is not None
    assert report.first_diverging.short in fault.or_taps


@pytest.mark.parametrize("name", SMALL)
def test_a_scale_that_is_smaller_than_rounding_is_named(wide: Patient, name: str) -> None:
    fault = SCALES[name]
    report = examine(wide, fault, layers=None if fault.layer is None else [fault.layer], dtype="bfloat16")
    assert fault.named_by(report), verdict(report)
    first = report.first_diverging
    assert first is not None
    assert first.exceeded(report.limits) == ("systematic",)
    assert first.systematic is not None
    if "hc_" in name:
        return  # through a sigmoid or Sinkhorn's iterations
    assert 0.006 < first.systematic.size < 0.013
    said = f"Every element of {first.name} is "
    if "expert 3" in name:
        said = f"The output of expert {EXPERT} of {first.name} is "
    if ".ape" in name:
        said = f"The errors of {first.name} are those of a position bias (ape) that is "
    assert said in verdict(report)
    assert "% too large." in verdict(report)


def test_a_scale_is_said_in_words_in_float32_too(patients: Patients) -> None:
    def plant(arrays: Arrays) -> None:
        arrays["layers.1.attn.wo_b"] = arrays["layers.1.attn.wo_b"] * np.float32(1.05)

    report = examine(patients["main"], Fault(name="scale", layer=CSA, tap="attn.wo_b", arrays=plant), layers=[CSA])
    assert "Every element of layers.1.attn.wo_b is 5 % too large." in verdict(report)
    assert "Every element" not in verdict(examine(patients["main"], CATALOGUE["square wq_a transposed"], layers=[CSA]))


def test_a_compact_golden_sees_a_small_scale(compact: Patients) -> None:
    wide = compact["wide"]
    assert ParityRun(wide.held, wide.golden, ParityOptions(layers=[0], dtype="bfloat16")).run().passed
    fault = SCALES["layers.0.attn.wkv times 1 + 2^-7"]
    report = examine(wide, fault, layers=[0], dtype="bfloat16")
    assert fault.named_by(report), verdict(report)
    assert "Every element of layers.0.attn.wkv is 0.8" in verdict(report)


def test_other_weights_come_first(patients: Patients, tmp_path: Path) -> None:
    """All values differ in weights of another seed, one parameter where one tensor was changed."""
    main = patients["main"]
    write_checkpoint(tmp_path / "hf", MAIN, seed=1)
    others = Held.read_from(PublishedWeights.open(tmp_path / "hf"))
    report = ParityRun(others, main.golden, ParityOptions(layers=[1])).run()
    assert verdict(report).startswith("FAIL: other weights than the golden's, in ")
    assert not report.passed
    assert report.other_weights is not None
    assert "layers.1.attn.wq_a" in report.other_weights
    assert "Next: Compare with a golden of these weights" in verdict(report)
    right = ParityRun(main.held, main.golden, ParityOptions(layers=[1])).run()
    assert right.other_weights == ()
    fault = CATALOGUE["square wq_a transposed"]
    assert verdict(examine(main, fault, layers=[1])).startswith(
        "FAIL: other weights than the golden's, in 1 parameter (layers.1.attn.wq_a); "
    )
    # Weights that the compared taps do not use still are others.
    unused = examine(main, fault, layers=[1], taps=["hc_attn.pre"])
    assert not unused.passed
    assert unused.agrees
    assert "but other weights than the golden's, in 1 parameter (layers.1.attn.wq_a)" in verdict(unused)
