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
from dsv4_convert.parity.programs import ModelOptions
from dsv4_convert.parity.report.data import ParityReport
from dsv4_convert.parity.report.words import verdict
from dsv4_convert.parity.run import ParityOptions, ParityRun
from dsv4_convert.weights.published import PublishedWeights

from ..model.test_numerics import RELEASE
from ..parity.faults.fault import uncompiled
from .test_release import CODE, CODE_0731, _arguments, _filled

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


def check_draft(model: Any, ids: torch.Tensor, golden: Golden) -> None:
    """The golden's last block is what a whole model of the code drafts after tokens ``[B, S]``, the last one by one."""
    tokens = ids.shape[1]
    begun = tokens - DECODE
    _, _, read = model(ids[:, :begun], 0)
    assert model.forward_spec(ids[:, begun], read, 0) is None
    for token in range(begun, tokens - 1):
        _, _, read = model(ids[:, token : token + 1], token)
        drafted, logits, confidence = model.forward_spec(ids[:, token + 1], read, token)
    np.testing.assert_array_equal(drafted[:, 1:, None].numpy(), golden.read("mtp.2.tokens"))
    np.testing.assert_array_equal(logits.numpy(), golden.read("mtp.2.draft_logits"))
    np.testing.assert_array_equal(confidence.numpy(), golden.read("mtp.2.confidence"))


def test_the_draft_is_what_the_whole_code_computes(weights: PublishedWeights, golden: Golden) -> None:
    """The code's own model and ``forward_spec``, call by call, which nobody watches."""
    required, of_stages = V4Interface.required, V4Interface.of_stages(weights.config)
    code, ids = release_code.load(CODE_0731, required, besides=of_stages), torch.from_numpy(IDS.astype(np.int64))
    with code.active():
        args = _arguments(code, weights, IDS, STAGES)
        check_draft(_filled(code, code.module.Transformer(args), weights), ids, golden)
    assert (golden.read("mtp.2.draft_logits") != golden.read("mtp.2.logits")).all(), "the head is read before it adds"


def check_rounding(of: ParityReport) -> None:
    """Nearly all values are equal to the last bit; one rounding of every value would be 1.7e-3."""
    assert of.agrees, verdict(of)
    errors = {result.name: result.distance.relative_rms for result in of.taps if result.distance is not None}
    assert any(name.endswith("cache.window") for name in errors)
    assert max(errors.values()) < 3e-4


def test_the_stages_round_where_the_code_does(weights: PublishedWeights, golden: Golden) -> None:
    report = ParityRun(weights, golden, ParityOptions(layers=STAGES)).run()
    assert report.arithmetic == "bfloat16 in release numerics"
    assert {"mtp.0.attn.main.kv_rope", "mtp.2.confidence"} <= {result.name for result in report.taps}
    check_rounding(report)


@pytest.mark.parametrize("layer", [STAGES[-1], pytest.param(STAGES[0], marks=pytest.mark.thorough)])
def test_the_compiled_stages_round_there_too(weights: PublishedWeights, golden: Golden, layer: int) -> None:
    check_rounding(ParityRun(weights, golden, ParityOptions(layers=[layer]), model=ModelOptions()).run())


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
    with pytest.raises(BadInput, match=r"has no DSparkBlock, .*; expected the inference code"):
        record(folder / "fp4", tmp_path / "golden", options)
    assert not (tmp_path / "golden").exists()
