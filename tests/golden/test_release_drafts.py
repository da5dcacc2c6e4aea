"""Goldens of DSpark's stages by the release's inference code, of which ``release_code_0731`` is the stand-in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from dsv4_convert.errors import BadInput
from dsv4_convert.golden.archive import Golden
from dsv4_convert.golden.recorder import RecordingOptions, record
from dsv4_convert.golden.references.release import code as release_code
from dsv4_convert.golden.references.release.v4 import V4Interface
from dsv4_convert.golden.synthetic import dspark_config, write_checkpoint
from dsv4_convert.model import Numerics, attention, dspark
from dsv4_convert.parity.programs import Program
from dsv4_convert.parity.report.words import verdict
from dsv4_convert.parity.run import ParityOptions, ParityRun, run_parity
from dsv4_convert.weights.published import PublishedWeights

from ..model.test_numerics import RELEASE
from ..parity.faults.fault import uncompiled
from .test_release import CODE, CODE_0731, _filled, arguments

#: Two window-only layers, both of which the stages read.
LAYERS = {"num_hidden_layers": 2, "num_hash_layers": 0, "compress_ratios": [0, 0, 0, 0, 0]}
RAW = dspark_config(**RELEASE | {"num_attention_heads": 4, "dspark_target_layer_ids": [0, 1]} | LAYERS)
STAGES = (2, 3, 4)
#: More tokens are known than the window of 16 has, before the first one that comes by itself.
TOKENS, DECODE = 21, 3
IDS = np.random.default_rng(1).integers(0, RAW["vocab_size"], (1, TOKENS)).astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release_drafts")
    write_checkpoint(folder / "fp4", RAW, seed=3)
    return folder


@pytest.fixture(scope="module")
def golden(folder: Path) -> Golden:
    options = RecordingOptions(tokens=IDS, decode=DECODE, stages=True, release_code=CODE_0731)
    return record(folder / "fp4", folder / "golden", options)


@pytest.fixture(scope="module")
def weights(folder: Path) -> PublishedWeights:
    return PublishedWeights.open(folder / "fp4")


def test_the_draft_is_what_the_whole_code_computes(weights: PublishedWeights, golden: Golden) -> None:
    """The code's own model and ``forward_spec``, call by call, which nobody watches."""
    code = release_code.load(CODE_0731, V4Interface.required, stages=True)
    ids = torch.from_numpy(IDS.astype(np.int64))
    begun = TOKENS - DECODE
    with code.active():
        args = arguments(code, weights, IDS, weights.config.stage_layers)
        model: Any = _filled(code, code.module.Transformer(args), weights)
        _, _, read = model(ids[:, :begun], 0)
        assert model.forward_spec(ids[:, begun], read, 0) is None
        for token in range(begun, TOKENS - 1):
            _, _, read = model(ids[:, token : token + 1], token)
            drafted, logits, confidence = model.forward_spec(ids[:, token + 1], read, token)
    np.testing.assert_array_equal(drafted[:, 1:, None].numpy(), golden.read("mtp.2.tokens"))
    # The recording evaluates the head for one token at a time, whose sums may have another order.
    np.testing.assert_allclose(logits.numpy(), golden.read("mtp.2.draft_logits"), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(confidence.numpy(), golden.read("mtp.2.confidence"))
    assert (golden.read("mtp.2.draft_logits") != golden.read("mtp.2.logits")).all(), "the head is read before it adds"


def test_the_stages_round_where_the_code_does(folder: Path, golden: Golden) -> None:
    """Nearly all values are equal to the last bit; one rounding of every value would be 1.7e-3."""
    options = ParityOptions(layers=STAGES, programs=tuple(Program))
    report = run_parity(None, golden.path, options, source=folder / "fp4")
    assert report.passed, verdict(report)
    assert report.arithmetic == "bfloat16 in release numerics"
    assert report.model is not None
    assert report.model.agrees
    for of in (report, report.model):
        errors = {result.name: result.distance.relative_rms for result in of.taps if result.distance is not None}
        assert {"mtp.1.cache.window", "mtp.0.attn.main.kv_rope", "mtp.2.confidence"} <= errors.keys()
        assert max(errors.values()) < 3e-4


FAULTS: dict[str, tuple[str, Any, str, Callable[..., Any]]] = {
    "keys not quantised": ("attn.main.kv_rope", Numerics, "key", lambda self, kv, rotated: kv),
    "inputs of matrices not quantised": ("main_proj", Numerics, "input", lambda self, x: x),
    "probabilities divided before they are rounded": (
        "attn.context", dspark, "attend_as_released", lambda *given: attention.attend(*given[:4])),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_step_left_out_is_named(golden: Golden, weights: PublishedWeights, name: str) -> None:
    tap, owner, attribute, replacement = FAULTS[name]
    with uncompiled(), patch.object(owner, attribute, replacement):
        report = ParityRun(weights, golden, ParityOptions(layers=[STAGES[0]])).run()
    assert not report.passed
    assert f"mtp.0.{tap}" in [result.name for result in report.localizations[0].wrong]


def test_code_of_another_kind_of_stage_is_refused(folder: Path, tmp_path: Path) -> None:
    options = RecordingOptions(tokens=IDS, stages=True, release_code=CODE)
    with pytest.raises(BadInput, match=r"has no DSparkBlock, and .* has its stages"):
        record(folder / "fp4", tmp_path / "golden", options)
    assert not (tmp_path / "golden").exists()
