"""Goldens of V4.1's inference code: a stand-in with the same interface, written for these tests.

On the checkpoints of these tests every tap, noise floors included, has the bits that the published code gives.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import dsv4_convert.golden as golden_package
from dsv4_convert.errors import BadInput, Dsv4Error, UsageError
from dsv4_convert.golden.archive import Golden, open_golden
from dsv4_convert.golden.noise import MODES
from dsv4_convert.golden.recorder import RecordingOptions, record
from dsv4_convert.golden.references.release import code as release_code
from dsv4_convert.golden.references.release.interface import PromptCalls, StoredAs
from dsv4_convert.golden.references.release.v41 import V41Interface, _Tokenizer
from dsv4_convert.golden.references.release.weights import CodeWeights
from dsv4_convert.golden.synthetic import tiny_v41_config, write_checkpoint
from dsv4_convert.model.v41.numerics import V41Numerics
from dsv4_convert.parity.gate import BaselineRequest
from dsv4_convert.parity.programs import ModelOptions, Program
from dsv4_convert.parity.report.words import verdict
from dsv4_convert.parity.run import ParityOptions, ParityRun, run_parity
from dsv4_convert.spec.tap import Values
from dsv4_convert.weights.published import PublishedWeights

from ..parity.faults.fault import uncompiled
from ..parity.v41 import automodel
from .test_release import CODE as CODE_OF_V4
from .test_release import _filled

CODE = Path(__file__).parent / "release_code_v41"
#: A golden of the published code, of the small checkpoint that ``golden make-checkpoint --model v4.1`` makes.
COMMITTED = Path(golden_package.__file__).parent / "data" / "tiny-v4.1"
RAW, AUTOMODEL = automodel("every kind of layer")
TOKENS = AUTOMODEL.pop("tokens")
#: Tokens of the golden in release numerics, the last ones one by one; a pair is incomplete before and among them.
SOME, DECODE = 13, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release_v41")
    write_checkpoint(folder / "hf", RAW, seed=0)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the committed golden."""
    folder = tmp_path_factory.mktemp("small_v41") / "hf"
    write_checkpoint(folder, tiny_v41_config(), seed=0)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> Golden:
    options = RecordingOptions(tokens=TOKENS, release_code=CODE, numerics="plain", noise=["float32"])
    return record(folder / "hf", folder / "plain", options)


@pytest.fixture(scope="module")
def released(folder: Path) -> Golden:
    options = RecordingOptions(tokens=TOKENS[:, :SOME], decode=DECODE, release_code=CODE)
    return record(folder / "hf", folder / "released", options)


def test_plain_numerics_are_what_automodel_computes(plain: Golden) -> None:
    """Automodel shares no code with the published one; its activations were recorded on the same checkpoint."""
    assert plain.numerics == "plain"
    assert plain.manifest.request.reference.dtype == "float32"
    assert len(AUTOMODEL) > 30
    for key in (key for key in plain.keys if str(key) in AUTOMODEL):
        found, expected = plain.read(key), AUTOMODEL.pop(str(key))
        if key.tap.values is Values.CHOICE:
            np.testing.assert_array_equal(found, expected, str(key))
        else:
            error = np.sqrt(np.mean((found - expected.astype(np.float64)) ** 2) / np.mean(expected**2.0))
            assert error < 5e-6, str(key)
    assert AUTOMODEL == {}


def test_the_committed_golden_is_what_this_code_computes(small: Path, tmp_path: Path) -> None:
    """It was recorded from the published code. On the machine where it was, the two have the same bits."""
    committed = open_golden(COMMITTED)
    options = RecordingOptions(tokens=committed.tokens, stages=True, release_code=CODE, numerics="plain", noise=[])
    again = record(small, tmp_path / "golden", options)
    assert again.names == committed.names
    for name in committed.names:
        found, expected = again.read(name), committed.read(name)
        if found.dtype == np.int32:
            np.testing.assert_array_equal(found, expected, name)
        else:
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=name)
    versions = [golden.manifest.request.reference.versions["model.py"] for golden in (again, committed)]
    assert versions[0] != versions[1]


def test_the_committed_golden_passes_parity_at_the_floor(small: Path) -> None:
    committed, options = open_golden(COMMITTED), ParityOptions(programs=[Program.STREAMED], modes=MODES)
    baseline = BaselineRequest(path=Path(f"{COMMITTED}.baseline.json"))
    with uncompiled():
        report = run_parity(None, COMMITTED, options, source=small, baseline=baseline)
    assert report.passed, verdict(report)
    assert not report.uncovered
    assert {result.key for result in report.taps} >= {key for key in committed.keys if key.layer is not None}


def test_the_committed_golden_passes_compiled_in_bfloat16(small: Path) -> None:
    """The layer that nominates candidates and the stage that chooses tokens, from codes and a cache."""
    options = ParityOptions(layers=[4, "mtp.2"], dtype="bfloat16")
    model = ModelOptions(weights="source", chunk=7)
    report = ParityRun(PublishedWeights.open(small), open_golden(COMMITTED), options, model=model).run()
    assert report.passed, verdict(report)
    assert {result.key.label for result in report.taps} == {"4", "mtp.2"}


def test_release_numerics_pass_parity_operation_by_operation(folder: Path, released: Golden) -> None:
    """Nearly all values are equal to the last bit; one rounding of every value would be 1.7e-3."""
    options = ParityOptions(programs=[Program.STREAMED])
    with uncompiled():  # every layer and call would be a program of its own
        report = run_parity(None, released.path, options, source=folder / "hf")
    assert report.passed, verdict(report)
    assert report.arithmetic == "bfloat16 in release numerics"
    errors = {result.name: result.distance.relative_rms for result in report.taps if result.distance is not None}
    assert {"layers.4.engram.key", "layers.2.cache.compressor.gates", "layers.6.attn.indexer.scores"} <= errors.keys()
    assert max(errors.values()) < 3e-4


@pytest.mark.parametrize(
    ("step", "layer", "tap"),
    [("entry", 2, "attn.compressor.entries"), ("key", 0, "attn.kv_rope"), ("indexed", 6, "attn.indexer.q_rope")],
)
def test_a_rounding_left_out_is_named(folder: Path, released: Golden, step: str, layer: int, tap: str) -> None:
    weights = PublishedWeights.open(folder / "hf")
    with uncompiled(), patch.object(V41Numerics, step, lambda self, x, *others: x):
        report = ParityRun(weights, released, ParityOptions(layers=[layer])).run()
    assert f"layers.{layer}.{tap}" in {result.name for result in report.localizations[0].wrong}


def _whole(folder: Path, tokens: np.ndarray) -> tuple[release_code.Code, Any]:
    """The code, and its own model with all of its weights."""
    code = release_code.load(CODE, V41Interface.required)
    weights = PublishedWeights.open(folder / "hf")
    prompt = PromptCalls(torch.from_numpy(tokens.astype(np.int64)), [(0, tokens.shape[1])], folder / "hf", [])
    tokenizer = _Tokenizer(Tokenizer.from_file(str(folder / "hf" / "tokenizer.json")))
    with code.active():
        interface = V41Interface(code, weights.config, prompt, StoredAs(fp8=True, fp4_experts=True, float_scales=False))
        engram = interface.config.engram
        args = dataclasses.replace(interface.args, engram_num_embeddings=engram.num_embeddings)
        return code, _filled(code, code.module.Transformer(args, tokenizer), weights)


def test_every_call_is_what_the_whole_model_computes(folder: Path, released: Golden) -> None:
    """The whole model call by call, which nobody watches. While a pair is incomplete, its indexers read another layer's
    keys, which the recorder does not let them do."""
    ids = torch.from_numpy(released.tokens.astype(np.int64))
    calls = [(0, SOME - DECODE), *((at, at + 1) for at in range(SOME - DECODE, SOME))]
    logits = released.read("logits")

    def own_keys(indexer: Any, _: Any) -> None:
        if hasattr(indexer, "k_cache"):
            code.module.shared_attn.index_k = indexer.k_cache

    for mended in (True, False):
        code, model = _whole(folder, released.tokens)
        for layer in model.layers if mended else ():
            if layer.attn.indexer is not None:
                layer.attn.indexer.register_forward_pre_hook(own_keys)
        with code.active():
            same = [
                np.array_equal(model(ids[:, start:stop], start)[1].numpy(), logits[:, stop - 1])
                for start, stop in calls
            ]
        assert same[0]
        assert all(same) == mended
    assert "read their own" in released.manifest.request.reference.versions["decoding"]


def test_layers_without_those_that_they_read_have_their_inputs(folder: Path, plain: Golden, tmp_path: Path) -> None:
    """And a recording that was interrupted goes on with what earlier layers made."""

    class Stop(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        if what.startswith("layer 6"):
            raise Stop

    options = RecordingOptions(tokens=TOKENS, layers=[3, 5, 6], release_code=CODE, numerics="plain", noise=["float32"])
    with pytest.raises(Stop):
        record(folder / "hf", tmp_path / "golden", options, progress=stop)
    golden = record(folder / "hf", tmp_path / "golden", options)
    assert {"layers.3.input.chosen", "layers.5.input.entries", "layers.6.input.candidates"} <= {
        name for name in golden.names if name not in golden.manifest.aliases
    }
    for name in golden.names:
        np.testing.assert_array_equal(golden.read(name), plain.read(name), name)
        if name in {str(key) for key in golden.keys if key.tap.values is Values.REAL}:
            for mode in MODES:
                np.testing.assert_array_equal(golden.noise(name, "float32", mode), plain.noise(name, "float32", mode))


def test_a_table_of_n_grams_is_never_read_whole(folder: Path, tmp_path: Path) -> None:
    asked: list[tuple[str, int]] = []
    rows = CodeWeights.rows

    def counted(self: CodeWeights, name: str, wanted: np.ndarray) -> torch.Tensor:
        asked.append((name, len(wanted)))
        return rows(self, name, wanted)

    options = RecordingOptions(tokens=TOKENS[:, :2], layers=[1], release_code=CODE, noise=[])
    with patch.object(CodeWeights, "rows", counted):
        golden = record(folder / "hf", tmp_path / "golden", options)
    ids = np.unique(golden.read("layers.1.engram.ids"))
    assert asked == [(f"layers.1.engram.embed.{part}", len(ids)) for part in ("weight", "scale")]
    assert len(ids) < 2 * golden.config.tap_sizes(0)["J"] + 1 < ids.max()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": TOKENS[:, :1]}, UsageError, "a prefill of 1 token"),
        ({"tokens": TOKENS[:, :4], "decode": 3}, UsageError, "a prefill of 1 token"),
        ({"release_code": None}, UsageError, r"transformers has no DeepSeek-V4\.1"),
        ({"release_code": CODE_OF_V4}, BadInput, r"engram\.py: cannot be imported"),
        ({"numerics": "release", "noise": ["float32"]}, UsageError, "expected some of bfloat16"),
    ],
)
def test_what_is_not_recorded(
    folder: Path, tmp_path: Path, change: dict[str, Any], error: type[Dsv4Error], message: str
) -> None:
    options = RecordingOptions(**{"tokens": TOKENS[:, :6], "release_code": CODE, **change})
    with pytest.raises(error, match=message):
        record(folder / "hf", tmp_path / "golden", options)
    assert not (tmp_path / "golden").exists()


@pytest.mark.parametrize(
    ("file", "right", "wrong", "message"),
    [
        ("model.py", "self.k_norm(", "self.k_norm.forward(", r"attn\.indexer\.k_norm: not computed"),
        ("model.py", "def select_candidate_blocks(", "def candidate_blocks(", "has no select_candidate_blocks"),
        ("engram.py", "from dataclasses", "from data_classes", r"engram\.py: cannot be imported"),
    ],
)
def test_code_that_computes_otherwise_is_refused(
    folder: Path, tmp_path: Path, file: str, right: str, wrong: str, message: str
) -> None:
    for name in ("model.py", "engram.py"):
        text = (CODE / name).read_text(encoding="utf-8")
        assert name != file or right in text
        (tmp_path / name).write_text(text.replace(right, wrong) if name == file else text, encoding="utf-8")
    options = RecordingOptions(tokens=TOKENS[:, :6], layers=[2], noise=[], release_code=tmp_path)
    with pytest.raises(Dsv4Error, match=message):
        record(folder / "hf", tmp_path / "golden", options)
