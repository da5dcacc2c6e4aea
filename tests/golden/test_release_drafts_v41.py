"""Goldens of the draft stages of V4.1's inference code, by a stand-in with the same interface."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.golden.archive import Golden
from dsv4_convert.golden.recorder import RecordingOptions, record
from dsv4_convert.golden.references.release import code as release_code
from dsv4_convert.golden.references.release.interface import PromptCalls, StoredAs
from dsv4_convert.golden.references.release.v41 import V41Interface, _Tokenizer
from dsv4_convert.golden.synthetic import write_checkpoint
from dsv4_convert.model import attention, dspark
from dsv4_convert.model.v41.numerics import V41Numerics
from dsv4_convert.parity.report.words import verdict
from dsv4_convert.parity.run import ParityOptions, ParityRun
from dsv4_convert.weights.published import PublishedWeights

from ..parity.faults.fault import DRAFTS, V41_CODE, V41_DRAFTING, uncompiled
from .test_release import _filled
from .test_release_drafts import DECODE, TOKENS, check_draft, check_rounding

CODE = V41_CODE
FIRST, _, LAST = DRAFTS
IDS = np.random.default_rng(1).integers(0, V41_DRAFTING["text_config"]["vocab_size"], (2, TOKENS)).astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release_drafts_v41")
    write_checkpoint(folder / "fp4", V41_DRAFTING, seed=3)
    return folder


@pytest.fixture(scope="module")
def golden(folder: Path) -> Golden:
    options = RecordingOptions(tokens=IDS, decode=DECODE, stages=True, release_code=CODE)
    return record(folder / "fp4", folder / "golden", options)


@pytest.fixture(scope="module")
def weights(folder: Path) -> PublishedWeights:
    return PublishedWeights.open(folder / "fp4")


def test_the_draft_is_what_the_whole_code_computes(weights: PublishedWeights, golden: Golden, folder: Path) -> None:
    """The code's own model and ``forward_spec``, call by call, which nobody watches."""
    config, ids = weights.config, torch.from_numpy(IDS.astype(np.int64))
    code = release_code.load(CODE, V41Interface.required, besides=V41Interface.of_stages(config))
    prompt = PromptCalls(ids, [(0, TOKENS)], folder / "fp4", DRAFTS)
    tokenizer = _Tokenizer(Tokenizer.from_file(str(folder / "fp4" / "tokenizer.json")))
    with code.active():
        interface = V41Interface(code, config, prompt, StoredAs(fp8=True, fp4_experts=True, float_scales=False))
        interface.args.engram_num_embeddings = interface.config.engram.num_embeddings
        check_draft(_filled(code, code.module.Transformer(interface.args, tokenizer), weights), ids, golden)
    assert (golden.read("mtp.2.draft_logits") != golden.read("mtp.2.logits")).all(), "the head is read before it adds"


def test_the_stages_read_what_enters_the_attention_of_their_targets(golden: Golden) -> None:
    """After the engram, where there is one; and every stage hands on the weights that collapse its streams."""
    entering = golden.read("layers.0.input"), golden.read("layers.1.engram.streams")
    np.testing.assert_array_equal(golden.read("mtp.0.targets"), np.stack(entering, axis=2)[:, :-1])
    assert (golden.read("mtp.0.input.pre") == [1, 0, 0, 0]).all()
    assert golden.manifest.aliases["mtp.1.pre"] == "mtp.0.hc_ffn.pre"
    np.testing.assert_array_equal(golden.read("mtp.2.input.pre"), golden.read("mtp.1.hc_ffn.pre"))
    chosen = golden.read("mtp.1.ffn.gate.experts")
    assert chosen.shape == (len(IDS), 5, golden.config.dspark_num_experts_per_tok)  # type: ignore[attr-defined]
    assert golden.read("mtp.1.ffn.gate.logits").shape[-1] == golden.config.experts_of(FIRST) == 4


def test_the_stages_round_where_the_code_does(weights: PublishedWeights, golden: Golden) -> None:
    with uncompiled():
        report = ParityRun(weights, golden, ParityOptions(layers=DRAFTS)).run()
    assert report.arithmetic == "bfloat16 in release numerics"
    assert {"mtp.0.attn.main.kv_rope", "mtp.1.input.pre", "mtp.2.confidence"} <= {result.name for result in report.taps}
    check_rounding(report)


FAULTS: dict[str, tuple[str, Any, str, Callable[..., Any]]] = {
    "keys not quantised": ("attn.main.kv_rope", V41Numerics, "key", lambda self, kv, rotated: kv),
    "inputs of matrices not quantised": ("main_proj", V41Numerics, "input", lambda self, x: x),
    "probabilities divided before they are rounded": (
        "attn.context", dspark, "attend_as_released", lambda *given: attention.attend(*given[:4])),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_step_left_out_is_named(golden: Golden, weights: PublishedWeights, name: str) -> None:
    tap, owner, attribute, replacement = FAULTS[name]
    with uncompiled(), patch.object(owner, attribute, replacement):
        report = ParityRun(weights, golden, ParityOptions(layers=[FIRST])).run()
    assert not report.passed, verdict(report)
    assert f"mtp.0.{tap}" in [result.name for result in report.localizations[0].wrong]


def test_what_is_not_recorded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="DSpark drafts after the last token of a prompt"):
        record(folder / "fp4", tmp_path / "short", RecordingOptions(tokens=IDS[:, :2], stages=True, release_code=CODE))
    for file in ("model.py", "engram.py"):
        text = (CODE / file).read_text(encoding="utf-8").replace("class DSparkBlock(", "class Stage(")
        (tmp_path / file).write_text(text, encoding="utf-8")
    options = RecordingOptions(tokens=IDS, stages=True, release_code=tmp_path)
    with pytest.raises(BadInput, match=r"has no DSparkBlock, .*; expected the inference code of DeepSeek-V4\.1"):
        record(folder / "fp4", tmp_path / "golden", options)
