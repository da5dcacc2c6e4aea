"""The compiled layer as the model runs it: every path agrees, taps change nothing, and planted faults are named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_convert.errors import ResourceError, UsageError
from dsv4_convert.golden.layout import INPUT
from dsv4_convert.model.cache import Past, empty_layer
from dsv4_convert.parity import compiled, programs
from dsv4_convert.parity.compiled import CompiledForward
from dsv4_convert.parity.devices import Devices
from dsv4_convert.parity.programs import ModelOptions, Program, stack_of
from dsv4_convert.parity.report.junit import junit
from dsv4_convert.parity.report.words import next_steps, verdict
from dsv4_convert.parity.run import ParityOptions, ParityRun, run_parity
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.taps import TapKey
from dsv4_convert.weights.restore import layers_bytes

from ..processes import end, start
from .faults.program import HCA, MESHES, PATHS, PROGRAM, SECOND_CSA, Subject, examine, options_of, subject
from .tpu_products import tpu_products

FLASH = Path(__file__).parents[1] / "data" / "configs" / "DeepSeek-V4-Flash.json"
ONE_DEVICE = [path for path in PATHS if path not in MESHES]
#: Layers that a path is tried with, where all are not needed.
LAYERS = {"grouped": [0, 1], "codes": [0, 1], "grouped codes": [0, 1], "cache": [0, 1, HCA], "scanned": [SECOND_CSA]}
#: One fault of each path; ``python -m benchmarks.faults --program model`` plants all of them.
SAMPLE = {path: next(fault for fault in PROGRAM if fault.path == path) for path in PATHS}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject(tmp_path_factory.mktemp("program"))


@pytest.mark.parametrize("path", [path for path in ONE_DEVICE if path != "indexer"])
def test_every_path_agrees(healthy: Subject, path: str) -> None:
    """Within the limits of the streamed layer; index scores are not recorded, as they would change the program."""
    report = examine(healthy, path, layers=LAYERS.get(path))
    assert report.passed, verdict(report)
    assert report.program is not None
    assert report.program.experts == ("grouped" if path.startswith("grouped") else "packed")
    assert report.program.weights == ("source" if path.endswith("codes") else "expanded")
    assert report.program.chunk == PATHS[path].chunk
    compared = {result.key for result in report.taps}
    wanted = {key for layer in report.layers for key in healthy.golden.taps(layer)}
    assert {key.tap.name for key in wanted - compared} <= {"attn.indexer.scores", "input"}, "which are not its own"


@pytest.mark.parametrize("path", ONE_DEVICE)
def test_taps_do_not_change_the_program(healthy: Subject, path: str) -> None:
    """Streams and state are bit-equal whether taps are results or not."""
    run = ParityRun(healthy.weights, healthy.golden, ParityOptions(layers=[SECOND_CSA]), model=PATHS[path])
    forward = run._forward
    assert isinstance(forward, CompiledForward)
    program, state = forward._program(SECOND_CSA)
    call = forward._calls[-1]
    config = healthy.golden.config
    streams = call.take(jnp.asarray(healthy.golden.read(TapKey(SECOND_CSA, INPUT))))
    past = None
    if call.cached:
        cache = jax.tree.map(
            lambda part: jax.random.normal(jax.random.key(0), part.shape, part.dtype),
            empty_layer(
                config, config.layer_kind(SECOND_CSA), len(streams), healthy.golden.tokens.shape[1], jnp.float32
            ),
        )
        past = Past(cache, jnp.asarray(call.start), jnp.asarray(call.count))
    operands = (streams, call.take(jnp.asarray(healthy.golden.tokens)), jnp.asarray(call.tokens, jnp.int32), {}, past)
    left, values, after = compiled.run_layer(program, state, *operands)
    plain, nothing, plain_after = compiled.run_layer(program._replace(recorded=False), state, *operands)
    assert len(values) > 30
    assert not nothing
    assert np.array_equal(left, plain)
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(plain_after), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("path", ONE_DEVICE)
def test_a_fault_of_the_program_is_named(healthy: Subject, path: str) -> None:
    fault = SAMPLE[path]
    report = examine(healthy, path, fault, **options_of(fault))
    assert report.first_diverging is not None
    assert report.first_wrong is not None
    assert report.first_diverging.name == report.first_wrong.name == fault.full_tap


def test_every_path_has_its_faults() -> None:
    counts = {path: sum(fault.path == path for fault in PROGRAM) for path in PATHS}
    assert min(counts.values()) >= 6, counts
    assert len({(fault.path, fault.name) for fault in PROGRAM}) == len(PROGRAM)


def test_sharded_it_agrees_and_its_faults_are_named(tmp_path: Path) -> None:
    """In a process with eight simulated devices."""
    ended = end(start(["-m", "tests.parity.sharded_program", str(tmp_path)], devices=8), timeout=900)
    assert ended.code == 0, ended.err[-3000:]
    assert ended.out.count("agrees") == ended.out.count("named") == len(MESHES) + 3


@pytest.mark.parametrize(("precision", "passes"), [("highest", True), ("default", False)])
def test_limits_hold_for_the_products_of_a_tpu(healthy: Subject, precision: str, passes: bool) -> None:
    """Six passes of bfloat16 are as good as float32; one is not. ``python -m benchmarks.tpu_products`` shows more."""
    with tpu_products(precision) as made:
        report = examine(healthy, "grouped", layers=[SECOND_CSA])
    assert "ragged_dot" in made
    assert report.passed is passes, verdict(report)


def test_both_programs_are_reported_and_told_apart(healthy: Subject) -> None:
    """A fault of the grouped path alone: every operation is right, and the compiled layer is not."""
    fault = SAMPLE["grouped"]
    streamed = ParityRun(healthy.weights, healthy.golden, ParityOptions(**options_of(fault))).run()
    agreeing, wrong = (
        dataclasses.replace(streamed, model=examine(healthy, "grouped", planted, **options_of(fault)))
        for planted in (None, fault)
    )
    assert agreeing.passed
    said = "Programs: streamed on cpu: agrees. model on cpu, grouped (ragged_dot) experts, expanded weights: agrees."
    assert said in verdict(agreeing)
    assert wrong.agrees
    assert not wrong.passed
    sentence = verdict(wrong)
    assert sentence.startswith(
        "FAIL: each operation is right; the compiled layer is not: layers.0.ffn.experts is the first tap that parts"
    )
    assert "through grouped (ragged_dot) experts, expanded weights" in sentence
    assert "`--program model --layer 0`" in " ".join(next_steps(wrong))
    listed = wrong.to_json(sentence)["programs"]
    assert [(of["program"], of["verdict"], of["first_wrong_operation"]) for of in listed] == [
        ("streamed", "pass", None),
        ("model", "fail", "layers.0.ffn.experts"),
    ]
    suites = ET.fromstring(junit(wrong)).findall("testsuite")
    assert [suite.get("failures") == "0" for suite in suites] == [True, False]
    assert {case.get("classname") for case in suites[1].findall("testcase")} == {"model.isolated.layers.0"}


def test_only_what_fits_the_memory_is_tried(healthy: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expanded weights, else codes; neither: an error if they were asked for, and otherwise the report says so."""
    options = ParityOptions(layers=[HCA], taps=["attn_norm"])
    folder = healthy.golden.path

    def run(free: int, asked: tuple[Program, ...] | None = None) -> Any:
        monkeypatch.setattr(programs, "available_bytes", lambda mesh: free)
        return run_parity(folder.parent / "orbax", folder, dataclasses.replace(options, programs=asked))

    report = run(100)
    assert report.passed
    assert report.model is None
    assert "a layer with source weights and its activations take" in str(report.unproven)
    assert "model: not proven, since a layer with expanded weights" in verdict(report)
    with pytest.raises(ResourceError, match="a layer with expanded weights and its activations take"):
        run(100, (Program.MODEL,))
    expanded = ModelOptions(weights="expanded")
    needed = programs._needed(healthy.weights, healthy.golden, (HCA,), np.dtype(np.float32), expanded, Devices())
    for free, form in ((needed, "expanded"), (needed - 1, "source")):
        found = run(free).model
        assert found is not None
        assert found.program.weights == form


def test_chunks_of_no_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match="chunks of 0 tokens"):
        ModelOptions(chunk=0)


def test_a_layer_of_flash_is_planned_with_all_its_experts() -> None:
    """256 experts of 3 x 4096 x 2048 in float32 are 25.8 GB; a scanned layer brings its neighbours along."""

    class Sizes:
        config = Config.from_file(FLASH)

    one = layers_bytes(Sizes(), (3,))  # type: ignore[arg-type]
    assert 25.8e9 < one < 27e9
    assert stack_of(Sizes.config, 10, scanned=False) == (10,)
    stack = stack_of(Sizes.config, 10, scanned=True)
    assert stack == (7, 8, 9, 10)
    assert [Sizes.config.kind(layer) for layer in stack] == [Sizes.config.kind(layer) for layer in (9, 10)] * 2
    assert stack_of(Sizes.config, 3, scanned=True) == (6, 5, 4, 3)
