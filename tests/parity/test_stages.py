"""Goldens and parity of the mtp stage: both programs, both modes, tokens one by one, and every report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from dsv4_convert.cli import app
from dsv4_convert.errors import UsageError
from dsv4_convert.golden.archive import Golden
from dsv4_convert.golden.compact import Compact
from dsv4_convert.golden.noise import MODES, Mode
from dsv4_convert.golden.recorder import RecordingOptions, record
from dsv4_convert.golden.references.streamed import StreamedModel
from dsv4_convert.golden.shrink import shrink
from dsv4_convert.golden.synthetic import write_checkpoint
from dsv4_convert.model import Model
from dsv4_convert.parity import compiled
from dsv4_convert.parity.activations import Expected
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.programs import ModelOptions
from dsv4_convert.parity.report.data import ParityReport
from dsv4_convert.parity.report.github import summary
from dsv4_convert.parity.report.html.page import RunInfo, page
from dsv4_convert.parity.report.junit import junit
from dsv4_convert.parity.report.words import verdict
from dsv4_convert.parity.run import ParityOptions, ParityRun, run_parity
from dsv4_convert.weights.published import PublishedWeights

from .faults.catalogue import CATALOGUE
from .faults.fault import STAGE, STAGED, Held, names

TOKENS, DECODE = 40, 3
IDS = np.random.default_rng(3).integers(0, STAGED["vocab_size"], (2, TOKENS)).astype(np.int32)
OPTIONS = RecordingOptions(tokens=IDS, stages=True, decode=DECODE)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages") / "hf"
    write_checkpoint(folder, STAGED, seed=0)
    return folder


@pytest.fixture(scope="module")
def golden(source: Path) -> Golden:
    return record(source, source.parent / "golden", OPTIONS)


@pytest.fixture(scope="module")
def report(source: Path, golden: Golden) -> ParityReport:
    """Everything is compared, in both modes and both programs."""
    return run_parity(None, golden.path, ParityOptions(modes=MODES, detail=True), source=source)


def test_the_stage_agrees_in_both_programs_and_modes(golden: Golden, report: ParityReport) -> None:
    assert report.passed, verdict(report)
    assert report.layers == golden.layers == (0, STAGE)
    assert report.model is not None
    assert report.model.agrees
    for of in (report, report.model):
        assert of.program is not None
        assert STAGE in of.program.layers
        for mode in MODES:
            compared = {result.key for result in of.taps if result.mode is mode}
            missing = {key.tap.name for key in golden.taps(STAGE) if key not in compared}
            assert missing == ({"streams"} if mode is Mode.ISOLATED else set()), "which is the golden's own"
    assert report.unchecked is not None
    assert report.unchecked.stages == 0
    assert "stage" not in verdict(report)
    assert [split.layer for split in report.error_splits] == [0], "a stage hands its streams to no layer"


def test_taps_of_a_stage_come_after_the_head(golden: Golden) -> None:
    order = [
        golden.names.index(name) for name in ("layers.0.hc_ffn.streams", "logits", "mtp.0.streams", "mtp.0.logits")
    ]
    assert order == sorted(order)
    assert golden.manifest.aliases["mtp.0.streams"] == "layers.0.hc_ffn.streams"
    following = np.pad(IDS[:, 1:], ((0, 0), (0, 1)))
    embeddings = dict(zip(IDS.flat, golden.read("embed").reshape(IDS.size, -1), strict=True))
    expected = np.array([[embeddings[token] for token in row] for row in following[:, :-1]])
    assert np.array_equal(golden.read("mtp.0.embed")[:, :-1], expected)


def test_every_report_names_it(report: ParityReport) -> None:
    assert 'classname="isolated.mtp.0" name="e_proj"' in junit(report)
    assert "| mtp.0 |" in summary(report)
    assert ">mtp.0<" in page(report, RunInfo.now())


def test_activations_of_another_implementation(golden: Golden) -> None:
    """Names within the stage, as those of a layer."""
    expected = Expected(golden, dtype="float32")
    assert np.array_equal(expected.input(STAGE), golden.read("layers.0.hc_ffn.streams"))
    found = {name: golden.read(f"mtp.0.{name}") for name in ("e_proj", "logits")}
    assert {tap.name for tap in expected.check(found, layer=STAGE).taps} == {"mtp.0.e_proj", "mtp.0.logits"}
    assert expected.check({"logits": golden.read("logits")}).passed
    found["e_proj"] = found["e_proj"] * np.float32(1.001)
    assert expected.report(found, layer=STAGE).first_diverging is not None


@pytest.mark.parametrize("options", [{"layers": [STAGE]}, {"taps": ["mtp.0.*"]}])
def test_a_stage_alone_in_bfloat16(source: Path, golden: Golden, options: dict[str, Any]) -> None:
    run = ParityRun(PublishedWeights.open(source), golden, ParityOptions(dtype="bfloat16", **options))
    assert run._running == (STAGE,)
    found = run.run()
    assert found.passed, verdict(found)
    assert {result.layer for result in found.taps} == {STAGE}


def test_a_compact_golden_of_a_stage(source: Path, golden: Golden, tmp_path: Path) -> None:
    """The same in every byte, shrunk or recorded so; and the compiled layers agree with it from the tokens."""
    form = Compact.of([-1, 3], TOKENS)
    made = shrink(golden, tmp_path / "compact", form)
    again = record(source, tmp_path / "recorded", dataclasses.replace(OPTIONS, compact=form))
    assert made.manifest == again.manifest
    found = ParityRun(PublishedWeights.open(source), made, ParityOptions(), model=ModelOptions()).run()
    assert found.passed, verdict(found)
    assert found.modes == (Mode.CUMULATIVE,)


def test_weights_without_the_stage_leave_it_out(source: Path, golden: Golden) -> None:
    weights = Held.read_from(PublishedWeights.open(source))
    weights.layers = (0,)
    found = ParityRun(weights, golden).run()
    assert found.passed
    assert "This run says nothing about the draft stage" in verdict(found)


@pytest.mark.parametrize("name", ["projections swapped", "the model's collapse", "router bias dropped"])
def test_the_compiled_stage_names_a_fault_of_its_weights(source: Path, golden: Golden, name: str) -> None:
    fault = CATALOGUE[f"mtp: {name}"]
    weights = Held.read_from(PublishedWeights.open(source))
    assert fault.arrays is not None
    fault.arrays(weights.arrays)
    found = ParityRun(weights, golden, ParityOptions(layers=[STAGE]), model=ModelOptions(weights="expanded")).run()
    assert names(found, STAGE, (fault.tap,)), verdict(found)


def _with_given(change: Callable[[Any], Any]) -> Callable[..., Any]:
    draft = Model.draft

    def changed(self: Model, streams: Any, next_ids: Any, positions: Any, **options: Any) -> Any:
        return draft(self, streams, *change((next_ids, positions)), **options)

    return changed


@pytest.mark.parametrize(
    ("tap", "change"),
    [
        ("embed", lambda given: ((given[0] + 1) % STAGED["vocab_size"], given[1])),
        pytest.param("attn.q_rope", lambda given: (given[0], given[1] + 1), marks=pytest.mark.thorough),
    ],
)
def test_the_compiled_stage_names_a_fault_of_the_model(
    source: Path, golden: Golden, tap: str, change: Callable[[Any], Any]
) -> None:
    """The fault is in ``Model.draft``, which the streamed stage does not call."""
    options = ParityOptions(layers=[STAGE])
    run = ParityRun(PublishedWeights.open(source), golden, options, model=ModelOptions(weights="expanded"))
    traced = compiled.run_stage.__wrapped__
    fresh = jax.jit(lambda *operands: traced(*operands), static_argnums=0)  # programs of before have no fault
    with patch.object(Model, "draft", _with_given(change)), patch.object(compiled, "run_stage", fresh):
        assert names(found := run.run(), STAGE, (tap,)), verdict(found)


def test_a_wrong_output_matrix_is_named_at_the_head_first(source: Path, golden: Golden) -> None:
    """The stage has the same matrix, and runs after it."""
    weights = Held.read_from(PublishedWeights.open(source))
    weights.arrays["head"] = weights.arrays["head"][:, ::-1]
    found = ParityRun(weights, golden).run()
    assert found.first_diverging is not None
    assert found.first_diverging.name == "logits"
    assert [result.name for result in found.taps if result.verdict is Verdict.FAIL] == ["logits", "mtp.0.logits"]
    assert {path for localization in found.localizations for path in localization.weights} == {"head"}


def test_an_interrupted_recording_goes_on_with_the_stage(source: Path, golden: Golden, tmp_path: Path) -> None:
    """The model level is on disk by then, and is not computed again."""

    class Stop(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        if what == "stage mtp.0":
            raise Stop

    with pytest.raises(Stop):
        record(source, tmp_path / "golden", OPTIONS, progress=stop)
    steps: list[str] = []
    with patch.object(StreamedModel, "run_head", None):
        again = record(source, tmp_path / "golden", OPTIONS, progress=lambda done, total, what: steps.append(what))
    assert steps[-1] == "stage mtp.0"
    assert again.manifest == golden.manifest


def test_what_has_no_stage_is_refused(source: Path, golden: Golden, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", STAGED | {"num_nextn_predict_layers": 0, "compress_ratios": [0]}, seed=0)
    with pytest.raises(UsageError, match="has no draft stage"):
        record(tmp_path / "hf", tmp_path / "golden", OPTIONS)
    with pytest.raises(UsageError, match=r"layer 2: this model has the layers 0 to 0, and the draft stages mtp\.0"):
        ParityRun(PublishedWeights.open(source), golden, ParityOptions(layers=[2])).run()


def test_the_commands(source: Path, tmp_path: Path) -> None:
    run, out = CliRunner().invoke, str(tmp_path / "golden")
    asked = ["golden", "record", str(source), "--out", out, "--random", "9", "--layers", "0", "--noise", "float32"]
    done = run(app, [*asked, "--stages"])
    assert done.exit_code == 0, done.output
    shown = run(app, ["golden", "show", out]).output
    assert "stage mtp.0: " in shown
    assert "\ne_proj " in shown
    done = run(app, ["parity", "--source", str(source), "--golden", out, "--layer", "1", "--program", "streamed"])
    assert done.exit_code == 0, done.output
    assert "of layers 0 and 1 draft stage" in run(app, ["inspect", out]).output
