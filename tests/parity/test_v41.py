"""Parity of DeepSeek-V4.1: both programs, both modes, planted faults, and what layers read of one another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from dsv4_convert.cli import app
from dsv4_convert.convert import Storage, hf_to_orbax
from dsv4_convert.errors import BadInput
from dsv4_convert.golden.layout import carried, is_fed
from dsv4_convert.golden.noise import MODES, Mode
from dsv4_convert.parity import compiled
from dsv4_convert.parity.activations import Expected
from dsv4_convert.parity.choices import Scores, compare_choices
from dsv4_convert.parity.compiled import CompiledForward
from dsv4_convert.parity.floor import Floor
from dsv4_convert.parity.forward import Forward
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.programs import ModelOptions, Program
from dsv4_convert.parity.report.html.data import page_data
from dsv4_convert.parity.report.words import verdict
from dsv4_convert.parity.run import ParityOptions, ParityRun, run_parity
from dsv4_convert.parity.tolerances import LIMITS
from dsv4_convert.spec.tap import Values
from dsv4_convert.spec.taps import TapKey

from .faults import program, program_v41
from .faults.catalogue import CATALOGUE_V41
from .faults.fault import Patient, examine, patient, uncompiled
from .faults.v41 import CANDIDATES, CARRIED, CHOOSER, ENGRAM, LATE_READER, LIKE_V4, NGRAMS, READER, SHARED, SOURCE
from .v41 import automodel

#: A fault of each kind and place; ``python -m benchmarks.faults --model v4.1`` plants all of them.
SAMPLE = (
    "the same primes for n-grams of every size",
    "look-back past the start finds the first token",
    "engram tables swapped",
    "pre of the same half in the attention",
    "entries of the source before handed on",
    "an earlier choice handed on",
    "the newest block not forced",
    "index keys rotated before their norm",
    "candidates ignored",
    "rms_norm_eps 1e-6",
)
#: The same of the compiled layer; ``--program model`` plants all of them.
PROGRAM_SAMPLE = (
    "candidates ignored where scores are not recorded",
    "n-grams begin with the chunk",
    "a pair begins with the chunk",
)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Patient:
    """Every kind of layer, with a golden of which Automodel computed a part."""
    return patient(tmp_path_factory.mktemp("v41"), "v4.1")


@pytest.fixture
def eager() -> Iterator[None]:
    """Without programs, which take seconds to compile for small layers, and tenths of them to run."""
    with uncompiled():
        yield


def test_the_golden_has_what_automodel_computed(healthy: Patient) -> None:
    _, known = automodel("every kind of layer")
    assert np.array_equal(known.pop("tokens"), healthy.golden.tokens)
    assert len(known) > 30
    for name, value in known.items():
        assert np.array_equal(healthy.golden.read(name), value), name


@pytest.mark.usefixtures("eager")
def test_every_tap_agrees_in_both_modes(healthy: Patient) -> None:
    report = ParityRun(healthy.held, healthy.golden, ParityOptions(modes=MODES)).run()
    assert report.passed, verdict(report)
    assert not report.uncovered, "a fault in what is not reached cannot show"
    for mode in MODES:
        own = {key for key in healthy.golden.keys if not is_fed(key, mode)}
        assert {result.key for result in report.taps if result.mode is mode} == own
    assert max(result.distance.noise.row for result in report.taps if result.distance is not None) < 6


@pytest.mark.usefixtures("eager")
def test_no_table_of_n_grams_is_read(healthy: Patient) -> None:
    """Rows of it are: as many as the prompt has n-grams."""
    asked: list[str] = []
    read, read_rows = healthy.held.read, healthy.held.read_rows

    def rows(path: str, index: Any, dtype: Any = np.float32) -> Any:
        asked.append(path)
        assert index.shape == healthy.golden.shape(f"layers.{NGRAMS}.engram.ids") or path == "embed"
        return read_rows(path, index, dtype)

    def whole(path: str, dtype: Any = np.float32) -> Any:
        assert not path.endswith("engram.embed")
        return read(path, dtype)

    with patch.object(healthy.held, "read_rows", rows), patch.object(healthy.held, "read", whole):
        assert ParityRun(healthy.held, healthy.golden, ParityOptions(layers=[NGRAMS])).run().passed
    assert asked == [f"layers.{NGRAMS}.engram.embed"]


@pytest.mark.usefixtures("eager")
def test_tokens_that_come_one_by_one_give_the_same(healthy: Patient) -> None:
    """Layers read one another's entries from a cache, where the last token finds those of the tokens before."""
    golden, config = healthy.golden, healthy.golden.config
    forward = Forward(healthy.held, golden.tokens, decode=1)
    found, entering = forward.embed()
    for layer in range(config.num_hidden_layers):
        of_layer, entering = forward.layer(layer, entering)
        found |= of_layer
    for key, value in found.items():
        if key.tap.is_state:
            assert value.shape == (1, *value.shape[1:])
            continue
        expected = golden.read(key)
        assert value.shape == expected.shape, key
        if key.tap.values is Values.CHOICE:
            assert np.array_equal(value, expected), key
        elif key.tap.name != "attn.indexer.scores":  # where an entry is not there yet, there is no score
            np.testing.assert_allclose(value, expected, rtol=1e-3, atol=2e-5, err_msg=str(key))
    states = {str(key) for key in found if key.tap.is_state}
    assert f"layers.{SOURCE}.cache.compressor.values" in states
    assert f"layers.{READER}.cache.compressor.values" not in states


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", SAMPLE)
def test_a_planted_fault_is_named(healthy: Patient, name: str) -> None:
    fault = CATALOGUE_V41[name]
    assert fault.layer is not None
    layers = [fault.layer] if fault.runs is None else range(fault.layer + 1)
    report = examine(healthy, fault, layers=layers, **fault.options)
    assert fault.named_by(report), verdict(report)
    if fault.runs is not None:
        assert "The layer that makes it computes it rightly, so something else is handed on." in verdict(report)


def test_the_catalogue_covers_what_v41_has() -> None:
    assert len(CATALOGUE_V41) >= 100
    assert min(map(len, (ENGRAM, CARRIED, SHARED, LIKE_V4))) >= 10
    assert {fault.kind for fault in CATALOGUE_V41.values()} == {"weights", "decoding", "config", "code"}
    assert {fault.layer for fault in CATALOGUE_V41.values() if fault.model == "v4.1"} == {None, *range(7)}


def test_the_compiled_layer_agrees(healthy: Patient) -> None:
    """Layers that read others', expanded and at once; and in chunks, from codes."""
    weights, layers = healthy.source(), [READER, CHOOSER]
    for model in (ModelOptions(weights="expanded"), ModelOptions(weights="source", chunk=16)):
        report = ParityRun(weights, healthy.golden, ParityOptions(layers=layers), model=model).run()
        assert report.passed, verdict(report)
        compared = {result.key.tap.name for result in report.taps}
        wanted = {key.tap.name for layer in layers for key in healthy.golden.taps(layer) if not is_fed(key, MODES[0])}
        assert wanted - compared == {"attn.indexer.scores"}


@pytest.mark.parametrize("name", PROGRAM_SAMPLE)
def test_a_fault_of_the_compiled_layer_is_named(healthy: Patient, name: str) -> None:
    (fault,) = (fault for fault in program_v41.PROGRAM_V41 if fault.name == name)
    subject = program.Subject(healthy.source(), healthy.golden, program_v41.PATHS)
    report = program.examine(subject, fault.path, fault, **program.options_of(fault))
    assert fault.named_by(report), verdict(report)


def test_every_path_of_the_compiled_layer_has_its_faults() -> None:
    faults = program_v41.PROGRAM_V41
    assert len({(fault.path, fault.name) for fault in faults}) == len(faults) >= 90
    assert min(sum(fault.path == path for fault in faults) for path in program_v41.PATHS) >= 5


def test_taps_do_not_change_the_program(healthy: Patient) -> None:
    """The output of a layer is bit-equal whether taps are results or not."""
    layers = ParityOptions(layers=[CANDIDATES])
    run = ParityRun(healthy.source(), healthy.golden, layers, model=ModelOptions(weights="expanded"))
    forward = run._forward
    assert isinstance(forward, CompiledForward)
    program, state = forward._program(CANDIDATES)
    given = {name: healthy.golden.read(key) for name, key in carried(healthy.golden.config, CANDIDATES).items()}
    carry = forward._decoder.carry_of(given, jnp.float32)
    tokens = jnp.asarray(healthy.golden.tokens)
    operands = (carry, tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), {}, None)
    left, values, _ = compiled.run_layer(program, state, *operands)
    plain, nothing, _ = compiled.run_layer(program._replace(recorded=False), state, *operands)
    assert len(values) > 40
    assert not nothing
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(plain), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.usefixtures("eager")
def test_a_command_compares_a_folder_and_its_conversion(healthy: Patient, tmp_path: Path) -> None:
    hf_to_orbax(healthy.folder / "hf", tmp_path / "orbax", storage=Storage.SOURCE)
    given = ["--golden", str(healthy.golden.path), "--layer", str(READER), "--program", "streamed"]
    for sides in ([str(tmp_path / "orbax")], ["--source", str(healthy.folder / "hf")]):
        done = CliRunner().invoke(app, ["parity", *sides, *given])
        assert done.exit_code == 0, done.output
        assert "PASS" in done.output
    report = run_parity(
        tmp_path / "orbax", healthy.golden.path, ParityOptions(layers=[LATE_READER], programs=[Program.STREAMED])
    )
    assert report.passed


def test_a_golden_of_another_architecture_is_refused(healthy: Patient, golden: Path) -> None:
    with pytest.raises(BadInput, match=r"recorded from DeepSeek-V4, and the checkpoint is DeepSeek-V4\.1"):
        run_parity(None, golden, source=healthy.folder / "hf")


def test_another_implementation_gets_all_that_enters_a_layer(healthy: Patient) -> None:
    expected = Expected(healthy.golden)
    inputs = expected.inputs(CHOOSER)
    read = healthy.golden.read
    assert set(inputs) == {
        *("hc_ffn.streams", "hc_ffn.pre", "attn.compressor.entries", "attn.indexer.keys", "attn.indexer.candidates")
    }
    assert np.array_equal(inputs["attn.indexer.keys"], read(f"layers.{CANDIDATES}.attn.indexer.keys"))
    assert np.array_equal(expected.input(CHOOSER), read("layers.5.hc_ffn.streams"))
    assert set(expected.inputs(None)) == {"hc_ffn.streams", "hc_ffn.pre"}


def _scores(golden: Any, ours: Any, visible: int) -> Scores:
    arrays = [np.array([[row]], np.float32) for row in (golden, ours)]
    floor = np.full((1, 1), 1e-3)
    return Scores(arrays[0], Floor(floor, floor, 2.0**-24, floor), arrays[1], np.array([[visible]]))


def _chosen(*blocks: int) -> Any:
    return np.array([[blocks]], np.int32)


def test_blocks_are_as_good_as_their_best_entry_and_the_newest_is_always_there() -> None:
    scores = [5, 0, 4, 0, 4.002, 0, 1, 0, 9, 9]  # blocks of two, the last of which is not visible
    of_blocks = _scores(scores, scores, 7).of_blocks(2)

    def compared(ours: Any, golden: Any) -> Verdict:
        return compare_choices(ours, golden, of_blocks, LIMITS["float32"])[0]

    assert compared(_chosen(0, 2, 3), _chosen(0, 2, 3)) is Verdict.PASS
    assert compared(_chosen(0, 1, 2), _chosen(0, 2, 3)) is Verdict.FAIL, "the newest block is left out"
    assert compared(_chosen(0, 3, 4), _chosen(0, 2, 3)) is Verdict.FAIL, "a block of the future"
    assert compared(_chosen(1, 2, 3), _chosen(0, 2, 3)) is Verdict.FAIL, "a worse block"
    tied = _scores(scores, [5, 0, 4.002, 0, 4, 0, 1, 0, 9, 9], 7).of_blocks(2)
    assert compare_choices(_chosen(0, 1, 3), _chosen(0, 2, 3), tied, LIMITS["float32"])[0] is Verdict.TIE


def test_a_choice_is_one_inside_the_candidates() -> None:
    scores = [5, 3, 4, 1, 2, 0]
    inside = _scores(scores, scores, 6).inside(_chosen(0, 2, -1), 2)

    def compared(ours: Any, golden: Any) -> Verdict:
        return compare_choices(ours, golden, inside, LIMITS["float32"])[0]

    assert compared(_chosen(0, 1), _chosen(0, 1)) is Verdict.PASS
    assert compared(_chosen(0, 2), _chosen(0, 1)) is Verdict.FAIL, "better, and not among the candidates"
    assert compared(_chosen(0, 4), _chosen(0, 1)) is Verdict.FAIL, "worse"
    close = [5, 3, 9, 9, 3.001, 0]
    tied = _scores(close, [5, 3.001, 9, 9, 3, 0], 6).inside(_chosen(0, 2, -1), 2)
    assert compare_choices(_chosen(0, 1), _chosen(0, 4), tied, LIMITS["float32"])[0] is Verdict.TIE


@pytest.mark.usefixtures("eager")
def test_every_input_is_judged_in_a_run_from_the_tokens(healthy: Patient) -> None:
    """Choices too, since a layer that hands on another one must not pass."""
    report = ParityRun(healthy.held, healthy.golden, ParityOptions(layers=[CHOOSER], modes=[Mode.CUMULATIVE])).run()
    names = {result.short for result in report.taps if result.short.startswith("input")}
    assert names == {"input", "input.pre", "input.entries", "input.keys", "input.candidates"}
    assert TapKey(CHOOSER, next(tap for tap in healthy.golden.config.taps if tap.name == "input.keys")) in {
        result.key for result in report.taps
    }


@pytest.mark.usefixtures("eager")
def test_the_page_says_what_every_choice_chooses(healthy: Patient) -> None:
    report = ParityRun(healthy.held, healthy.golden, ParityOptions(modes=[Mode.CUMULATIVE], detail=True)).run()
    found = {(choice.what, choice.how) for choice in page_data(report).agreements}
    assert found == {
        ("experts", "by score"),
        ("indexer", "by score"),
        ("indexer", "of an earlier layer"),
        ("candidate blocks", "by score"),
        ("candidate blocks", "of an earlier layer"),
        ("rows of n-grams", "by hash"),
    }
