"""Parity of decoding: the last tokens one by one, on the reference's cache and on ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import DeepseekV4ForCausalLM, DynamicCache
from typer.testing import CliRunner

from dsv4_convert.cli import app
from dsv4_convert.errors import UsageError
from dsv4_convert.golden.archive import Golden, open_golden
from dsv4_convert.golden.compact import Compact
from dsv4_convert.golden.noise import MODES, Mode
from dsv4_convert.golden.recorder import RecordingOptions, record
from dsv4_convert.golden.shrink import shrink
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.model import attention, compressor
from dsv4_convert.parity import forward
from dsv4_convert.parity.activations import compare_activations
from dsv4_convert.parity.comparison import Phase
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.programs import ModelOptions
from dsv4_convert.parity.report.data import ParityReport
from dsv4_convert.parity.run import ParityOptions, ParityRun
from dsv4_convert.spec.taps import TapKey, state_of
from dsv4_convert.weights.published import PublishedWeights

from .faults.fault import Held
from .ties import swapped_expert

TOKENS, DECODE = 131, 6
IDS = np.random.default_rng(4).integers(0, 96, (2, TOKENS)).astype(np.int32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoding") / "hf"
    write_checkpoint(folder, tiny_config(), seed=0, form="bf16")
    return folder


@pytest.fixture(scope="module")
def golden(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """125 tokens at once, then 6: a block of HCA and one of CSA become complete among them."""
    return record(source, tmp_path_factory.mktemp("golden") / "golden", RecordingOptions(tokens=IDS, decode=DECODE))


def _failing(report: ParityReport) -> list[str]:
    return [result.name for result in report.taps if result.verdict is Verdict.FAIL]


@pytest.mark.parametrize(
    ("dtype", "modes"),
    [("float32", MODES), pytest.param("bfloat16", MODES[1:], marks=pytest.mark.thorough)],
)
def test_every_step_agrees(source: Path, golden: Golden, dtype: str, modes: tuple[Mode, ...]) -> None:
    report = ParityRun(PublishedWeights.open(source), golden, ParityOptions(modes=modes, dtype=dtype)).run()
    assert not _failing(report)
    assert report.decode == DECODE
    compared = {result.name for result in report.taps}
    config = golden.config
    state = {str(TapKey(layer, tap)) for layer in range(config.num_hidden_layers) for tap in state_of(config, layer)}
    assert state
    assert state <= compared


#: An HCA and a CSA layer with learned routing.
COMPRESSED = [2, 3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_compiled_layers_agree_step_by_step(source: Path, golden: Golden, dtype: str) -> None:
    """As the model decodes: one token a call, from the cache of the call before."""
    options = ParityOptions(layers=COMPRESSED, dtype=dtype)
    report = ParityRun(PublishedWeights.open(source), golden, options, model=ModelOptions(weights="expanded")).run()
    assert not _failing(report)
    names = {result.name for result in report.taps}
    assert {str(TapKey(layer, tap)) for layer in COMPRESSED for tap in state_of(golden.config, layer)} <= names


def test_a_compact_golden_and_the_compiled_layers(source: Path, golden: Golden, tmp_path: Path) -> None:
    made = shrink(golden, tmp_path / "compact", Compact.of([-1, 3], TOKENS))
    options, model = ParityOptions(phase=Phase.DECODE), ModelOptions(weights="expanded")
    weights = PublishedWeights.open(source)
    assert not _failing(ParityRun(weights, made, options, model=model).run())
    wrong = Held.read_from(weights)
    wrong.arrays["layers.2.attn.compressor.ape"] = np.roll(wrong.arrays["layers.2.attn.compressor.ape"], 1, axis=0)
    report = ParityRun(wrong, made, dataclasses.replace(options, layers=[0, 1, 2]), model=model).run()
    assert report.first_diverging is not None
    assert report.first_diverging.name == "layers.2.attn.compressor.pooled"


def test_the_recording_is_the_whole_model_on_its_cache(source: Path, golden: Golden) -> None:
    """Streams of every layer bit by bit, logits closely, as the reference's own model and cache give them."""
    model = DeepseekV4ForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").float()
    model.set_experts_implementation("eager")
    streams: dict[int, list[Any]] = {layer: [] for layer in range(golden.config.num_hidden_layers)}
    for layer, module in enumerate(model.model.layers):
        module.register_forward_hook(lambda _, __, output, at=layer: streams[at].append(output.numpy().copy()))
    cache = DynamicCache(config=model.config)
    ids = torch.from_numpy(IDS.astype(np.int64))
    first = TOKENS - DECODE
    with torch.no_grad():
        parts_of_ids = (ids[:, :first], *ids[:, first:].split(1, dim=1))
        logits = [model(part, None, None, cache, use_cache=True).logits.numpy() for part in parts_of_ids]
    for layer, parts in streams.items():
        recorded = golden.read(f"layers.{layer}.hc_ffn.streams")
        assert np.array_equal(np.concatenate(parts, axis=1), recorded)
    np.testing.assert_allclose(np.concatenate(logits, axis=1), golden.read("logits"), atol=2e-6)


def test_the_state_is_that_of_its_taps(golden: Golden) -> None:
    """The reference's cache holds the values that its taps have for the same tokens."""
    first, config = TOKENS - DECODE, golden.config
    for layer in range(1, 4):
        ratio = config.ratio_of(layer)
        rows = slice(first - first % ratio, first)
        pairs = {
            "cache.window": golden.read(f"layers.{layer}.attn.kv_rope")[:, first - config.sliding_window + 1 : first],
            "cache.compressor.values": golden.read(f"layers.{layer}.attn.compressor.wkv")[:, rows],
            "cache.compressor.gates": golden.read(f"layers.{layer}.attn.compressor.wgate")[:, rows],
        }
        for name, expected in pairs.items():
            assert expected.size
            assert np.array_equal(golden.read(f"layers.{layer}.{name}"), expected), name


def test_a_tie_of_another_implementation_leaves_the_state_as_it_is(golden: Golden) -> None:
    """The state has rows of its own, and was there before the choice."""
    layer = {key.tap.name: golden.read(key).copy() for key in golden.taps(3)}
    swapped_expert(layer, closest=True)
    del layer["ffn.gate.scores"]  # they would say that the golden's choice is the better one
    report = compare_activations(layer, golden, layer=3, dtype="bfloat16")
    assert report.passed
    assert report.count(Verdict.TIE) == 1
    layer["cache.window"][0, 0] += 1
    assert _failing(compare_activations(layer, golden, layer=3, dtype="bfloat16")) == ["layers.3.cache.window"]


@pytest.fixture
def fresh_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that were traced before a change of the code do not have it, nor may later tests have it."""
    traced = forward._to_experts.__wrapped__
    monkeypatch.setattr(forward, "_to_experts", jax.jit(lambda *operands: traced(*operands), static_argnums=0))


@pytest.mark.usefixtures("fresh_programs")
@pytest.mark.parametrize(
    ("change", "layer", "tap"),
    [
        ((attention, "latest", lambda rows, count, keep: rows[:, :keep]), 0, "cache.window"),
        ((compressor, "latest", lambda rows, count, keep: jnp.roll(rows[:, -keep:], 1, axis=1)), 2,
         "cache.compressor.values"),
        ((compressor.Compressor, "_pool", "lead"), 1, "attn.compressor.pooled"),
        ((attention, "complete_blocks", "late"), 2, "attn.context"),
    ],
    ids=["window never moves", "rows in another order", "overlap forgotten", "entries one step late"],
)  # fmt: skip
def test_a_fault_of_the_cache_shows_in_decoding_only(
    source: Path, golden: Golden, monkeypatch: pytest.MonkeyPatch, change: tuple[Any, str, Any], layer: int, tap: str
) -> None:
    where, name, how = change
    original = getattr(where, name)
    faults: dict[Any, Callable[..., Any]] = {
        # Whatever a prompt's first call did right: in the later ones the block before is taken for missing.
        "lead": lambda self, values, gates, lead=None: original(
            self, values, gates, None if lead is None else lead & (values.shape[1] > 3)
        ),
        "late": lambda token, ratio: original(token, ratio) if token.shape[1] > 1 else token // ratio,
    }
    monkeypatch.setattr(where, name, faults.get(how, how) if isinstance(how, str) else how)
    weights = PublishedWeights.open(source)
    report = ParityRun(weights, golden, ParityOptions(layers=[layer], modes=MODES[:1], phase=Phase.PREFILL)).run()
    assert not _failing(report)
    report = ParityRun(weights, golden, ParityOptions(layers=[layer], modes=MODES[:1], phase=Phase.DECODE)).run()
    assert f"layers.{layer}.{tap}" in _failing(report)


def test_a_compact_golden_of_decoding(source: Path, golden: Golden, tmp_path: Path) -> None:
    made = shrink(golden, tmp_path / "compact", Compact.of([-1, 3], TOKENS))
    for phase in Phase:
        report = ParityRun(PublishedWeights.open(source), made, ParityOptions(phase=phase)).run()
        assert not _failing(report)
        assert report.count(Verdict.PASS) > 100


def test_a_golden_without_decoding_has_no_such_phase(source: Path, tmp_path: Path) -> None:
    plain = record(source, tmp_path / "golden", RecordingOptions(tokens=IDS[:, :9], noise=["float32"]))
    with pytest.raises(UsageError, match="golden record --decode"):
        ParityRun(PublishedWeights.open(source), plain, ParityOptions(phase=Phase.DECODE)).run()
    for decode in (-1, 9):
        with pytest.raises(UsageError, match="so 0 to 8"):
            record(source, tmp_path / "none", RecordingOptions(tokens=IDS[:, :9], decode=decode))


@pytest.mark.parametrize(("tokens", "decode"), [pytest.param(2, 1, marks=pytest.mark.thorough), (9, 4)])
def test_short_prompts_and_edges_of_blocks(source: Path, tmp_path: Path, tokens: int, decode: int) -> None:
    """No block is complete at all; and one is, in the middle of the steps."""
    short = record(
        source, tmp_path / "golden", RecordingOptions(tokens=IDS[:1, :tokens], decode=decode, noise=["float32"])
    )
    report = ParityRun(PublishedWeights.open(source), open_golden(short.path), ParityOptions(modes=MODES)).run()
    assert not _failing(report)


def test_greedy_tokens_are_those_of_the_whole_model(source: Path, tmp_path: Path) -> None:
    chosen = record(
        source, tmp_path / "golden", RecordingOptions(tokens=IDS[:, :9], decode=3, greedy=True, layers=[1], noise=[])
    )
    model = DeepseekV4ForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").float()
    ids = torch.from_numpy(IDS[:, :9].astype(np.int64))
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert np.array_equal(chosen.tokens, model.generate(ids, max_new_tokens=3, **options).numpy())
    assert chosen.decode == 3
    assert chosen.layers == (1,)


def test_the_commands(source: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    out = str(tmp_path / "golden")
    done = run(
        app, ["golden", "record", str(source), "--out", out, "--random", "9", "--decode", "4", "--noise", "float32"]
    )
    assert done.exit_code == 0, done.output
    assert "decode         4" in run(app, ["golden", "show", out]).output
    # It has the shapes of test_short_prompts_and_edges_of_blocks, so the programs of that test serve here.
    done = run(app, ["parity", "--source", str(source), "--golden", out, "--phase", "decode", "--program", "streamed"])
    assert done.exit_code == 0, done.output
    assert "the last 4 tokens one by one" in " ".join(done.output.split())
    assert run(app, ["parity", "--source", str(source), "--golden", out, "--phase", "later"]).exit_code == 2
