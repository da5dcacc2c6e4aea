"""Goldens and parity of DSpark's stages: both programs, both modes, tokens one by one, and every report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dsv4_convert.cli import app
from dsv4_convert.errors import UsageError
from dsv4_convert.golden.archive import Golden
from dsv4_convert.golden.compact import Compact
from dsv4_convert.golden.noise import MODES, Mode
from dsv4_convert.golden.recorder import RecordingOptions, record
from dsv4_convert.golden.shrink import shrink
from dsv4_convert.golden.synthetic import write_checkpoint
from dsv4_convert.parity.activations import Expected
from dsv4_convert.parity.comparison import Phase
from dsv4_convert.parity.finished import FinishedSteps
from dsv4_convert.parity.programs import ModelOptions, Program
from dsv4_convert.parity.report.data import ParityReport
from dsv4_convert.parity.report.github import summary
from dsv4_convert.parity.report.html.page import RunInfo, page
from dsv4_convert.parity.report.junit import junit
from dsv4_convert.parity.report.words import verdict
from dsv4_convert.parity.run import ParityOptions, ParityRun, run_parity
from dsv4_convert.weights.published import PublishedWeights

from .faults import program, program_drafts
from .faults.fault import DRAFTING, DRAFTS, Held

TOKENS, DECODE = 40, 3
IDS = np.random.default_rng(3).integers(0, DRAFTING["vocab_size"], (2, TOKENS)).astype(np.int32)
OPTIONS = RecordingOptions(tokens=IDS, stages=True, decode=DECODE)
FIRST, _, LAST = DRAFTS


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
    assert report.layers == golden.layers == (0, 1, *DRAFTS)
    assert report.model is not None
    assert report.model.agrees
    for of in (report, report.model):
        for mode in MODES:
            compared = {result.key for result in of.taps if result.mode is mode}
            missing = {str(key) for key in golden.keys if key.stage is not None and key not in compared}
            fed = {"mtp.0.targets", *(f"mtp.{stage}.{name}" for stage in (1, 2) for name in ("streams", "context"))}
            assert missing == (fed if mode is Mode.ISOLATED else set()), "which are the golden's own"
    assert report.unchecked is not None
    assert report.unchecked.stages == 0
    assert [split.layer for split in report.error_splits] == [0, 1]


def test_the_block_begins_with_the_prompts_last_token(golden: Golden) -> None:
    """Behind it there is noise, and before it all that is known; the tokens are those of the highest logits."""
    embeddings = dict(zip(IDS.flat, golden.read("embed").reshape(IDS.size, -1), strict=True))
    block = golden.read("mtp.0.embed")
    assert np.array_equal(block[:, 0], [embeddings[token] for token in IDS[:, -1]])
    assert np.array_equal(block[0, 1:], np.repeat(block[:1, 1], 4, axis=0))
    targets = np.stack([golden.read(f"layers.{layer}.hc_ffn.streams")[:, :-1] for layer in (0, 1)], axis=2)
    assert np.array_equal(golden.read("mtp.0.targets"), targets)
    assert golden.manifest.aliases["mtp.2.context"] == "mtp.0.main_norm"
    assert golden.manifest.aliases["mtp.2.streams"] == "mtp.1.hc_ffn.streams"
    scores, tokens = golden.read("mtp.2.draft_logits"), golden.read("mtp.2.tokens")
    assert np.array_equal(scores.argmax(axis=-1), tokens[..., 0])
    assert np.array_equal(golden.read("mtp.1.cache.window"), golden.read("mtp.1.attn.main.kv_rope")[:, -7:-2])


def test_every_report_names_them(report: ParityReport) -> None:
    assert 'classname="isolated.mtp.2" name="confidence"' in junit(report)
    assert "| mtp.1 |" in summary(report)
    assert ">mtp.2<" in page(report, RunInfo.now())


def test_activations_of_another_implementation(golden: Golden) -> None:
    expected = Expected(golden, dtype="float32")
    assert np.array_equal(expected.input(LAST), golden.read("mtp.1.hc_ffn.streams"))
    found = {name: golden.read(f"mtp.2.{name}") for name in ("markov_head", "tokens", "confidence")}
    assert {tap.name for tap in expected.check(found, layer=LAST).taps} == {f"mtp.2.{name}" for name in found}
    found["markov_head"] = found["markov_head"] * np.float32(1.001)
    assert expected.report(found, layer=LAST).first_diverging is not None


@pytest.mark.parametrize("layer", [FIRST, pytest.param(LAST, marks=pytest.mark.thorough)])
def test_a_stage_alone_in_bfloat16(source: Path, golden: Golden, layer: int) -> None:
    run = ParityRun(PublishedWeights.open(source), golden, ParityOptions(dtype="bfloat16", layers=[layer]))
    assert run._running == (layer,)
    found = run.run()
    assert found.passed, verdict(found)
    assert {result.layer for result in found.taps} == {layer}


def test_the_known_tokens_in_chunks_or_before_decoding(source: Path, golden: Golden) -> None:
    """The stages keep a window between calls. A draft comes after all tokens, so the prefill alone has none."""
    options = ParityOptions(layers=[FIRST, LAST])
    weights = PublishedWeights.open(source)
    found = ParityRun(weights, golden, options, model=ModelOptions(chunk=7)).run()
    assert found.passed, verdict(found)
    options = dataclasses.replace(options, phase=Phase.PREFILL, layers=[FIRST])
    names = {result.short for result in ParityRun(weights, golden, options).run().taps}
    assert "attn.main.kv_rope" in names
    assert "attn.kv_rope" not in names


@pytest.mark.thorough
def test_a_compact_golden_of_the_stages(source: Path, golden: Golden, tmp_path: Path) -> None:
    """The same in every byte, shrunk or recorded so; and the compiled layers agree with it from the tokens."""
    form = Compact.of([-1, 3], TOKENS)
    made = shrink(golden, tmp_path / "compact", form)
    again = record(source, tmp_path / "recorded", dataclasses.replace(OPTIONS, compact=form))
    assert made.manifest == again.manifest
    found = ParityRun(PublishedWeights.open(source), made, ParityOptions(), model=ModelOptions()).run()
    assert found.passed, verdict(found)
    assert found.modes == (Mode.CUMULATIVE,)


@pytest.mark.parametrize(
    "name",
    [
        "tokens chosen after noise",
        "a stage's exponents off by one",
        "known tokens of earlier calls forgotten",
        pytest.param("the block embeds the tokens one later", marks=pytest.mark.thorough),
        pytest.param("gate and up of a stage swapped", marks=pytest.mark.thorough),
        "the block's positions counted from the call",
    ],
)
def test_the_compiled_stages_name_a_fault(source: Path, golden: Golden, name: str) -> None:
    """``python -m benchmarks.faults --program model`` plants all of them, of both architectures."""
    (fault,) = (fault for fault in program_drafts.of_stages(FIRST) if fault.name == name)
    subject = program.Subject(PublishedWeights.open(source), golden, program_drafts.PATHS)
    report = program.examine(subject, fault.path, fault, **program.options_of(fault))
    assert fault.named_by(report), verdict(report)


def test_targets_that_differ_show_from_the_tokens_on(source: Path, golden: Golden) -> None:
    """In isolated mode the stages read the golden's; cumulative ones those that the model's layers leave."""
    weights = Held.read_from(PublishedWeights.open(source))
    weights.arrays["layers.0.attn.wo_b"] = weights.arrays["layers.0.attn.wo_b"] * np.float32(1.01)
    found = ParityRun(weights, golden, ParityOptions(modes=MODES, layers=[0, 1, FIRST])).run()
    failing = {result.mode for result in found.taps if result.name == "mtp.0.main" and not result.passes}
    assert failing == {Mode.CUMULATIVE}


def test_an_interrupted_recording_goes_on_with_the_stages(source: Path, golden: Golden, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        if what == "stage mtp.1":
            raise Stop

    with pytest.raises(Stop):
        record(source, tmp_path / "golden", OPTIONS, progress=stop)
    steps: list[str] = []
    again = record(source, tmp_path / "golden", OPTIONS, progress=lambda done, total, what: steps.append(what))
    assert steps[-2:] == ["stage mtp.1", "stage mtp.2"]
    assert "layer 1 of 2" not in steps
    assert again.manifest == golden.manifest


@pytest.mark.parametrize("at", ["stage mtp.0", "stage mtp.1"])
def test_an_interrupted_comparison_goes_on_with_the_stages(
    source: Path, golden: Golden, report: ParityReport, tmp_path: Path, at: str
) -> None:
    """The streams of the target layers, and the context of the first stage, are kept."""

    class Stop(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        if what == at:
            raise Stop

    def run(progress: Callable[[int, int, str], None]) -> ParityReport:
        with FinishedSteps(tmp_path / "state") as steps:
            options = ParityOptions(modes=(Mode.CUMULATIVE,), programs=[Program.STREAMED], state=steps)
            return run_parity(None, golden.path, options, source=source, progress=progress)

    with pytest.raises(Stop):
        run(stop)
    said: list[str] = []
    found = run(lambda done, total, what: said.append(what))
    assert said[0] == at
    expected = {result.name: result.distance for result in report.taps if result.mode is Mode.CUMULATIVE}
    assert {result.name: result.distance for result in found.taps} == expected


def test_what_has_no_stage_or_no_place_for_a_draft_is_refused(source: Path, golden: Golden, tmp_path: Path) -> None:
    backbone = {name: value for name, value in DRAFTING.items() if not name.startswith("dspark_")}
    without = backbone | {"num_nextn_predict_layers": 0, "compress_ratios": [0, 0]}
    write_checkpoint(tmp_path / "hf", without, seed=0)
    with pytest.raises(UsageError, match="has no draft stage"):
        record(tmp_path / "hf", tmp_path / "golden", OPTIONS)
    with pytest.raises(UsageError, match="at least 2 tokens before it; the prompt has 2"):
        record(source, tmp_path / "golden", dataclasses.replace(OPTIONS, tokens=IDS[:, :2], decode=0))


def test_the_commands(source: Path, tmp_path: Path) -> None:
    run, out = CliRunner().invoke, str(tmp_path / "golden")
    asked = ["golden", "record", str(source), "--out", out, "--random", "9", "--layers", "0", "--noise", "float32"]
    done = run(app, [*asked, "--stages"])
    assert done.exit_code == 0, done.output
    shown = run(app, ["golden", "show", out]).output
    assert "stage mtp.2: " in shown
    assert "\nconfidence " in shown
    done = run(app, ["parity", "--source", str(source), "--golden", out, "--layer", "mtp.1", "--program", "streamed"])
    assert done.exit_code == 0, done.output
    assert "of layers 0 and 3 draft stages" in run(app, ["inspect", out]).output
