"""Goldens of the release's inference code: a stand-in with the same interface, written for these tests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dsv4_convert.cli import app
from dsv4_convert.convert import Storage, hf_to_orbax
from dsv4_convert.errors import BadInput, Dsv4Error, UsageError
from dsv4_convert.golden.archive import Golden, open_golden
from dsv4_convert.golden.compact import Compact
from dsv4_convert.golden.noise import MODES, Mode
from dsv4_convert.golden.recorder import RecordingOptions, record
from dsv4_convert.golden.references.release import code as release_code
from dsv4_convert.golden.references.release.interface import PromptCalls, StoredAs
from dsv4_convert.golden.references.release.v4 import V4Interface
from dsv4_convert.golden.shrink import shrink
from dsv4_convert.golden.synthetic import write_checkpoint
from dsv4_convert.model import Numerics, attention, experts, indexer, numerics
from dsv4_convert.parity.comparison import Phase
from dsv4_convert.parity.forward import Forward
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.programs import Program
from dsv4_convert.parity.report.words import summarized, verdict
from dsv4_convert.parity.run import ParityOptions, ParityRun, run_parity
from dsv4_convert.spec.taps import TapKey, state_of, tap_named
from dsv4_convert.weights.published import PublishedWeights

from ..model.test_numerics import RELEASE
from ..parity.faults.fault import uncompiled

CODE = Path(__file__).parent / "release_code"
CODE_0731 = Path(__file__).parent / "release_code_0731"
#: Window-only, CSA and HCA layers, hash-routed and not. YaRN, the clamp and the choice of entries all matter.
RAW = RELEASE | {"index_n_heads": 8, "num_attention_heads": 4, "compress_ratios": [0, 4, 128, 4, 0]}
TOKENS = np.random.default_rng(1).integers(0, RAW["vocab_size"], (1, 140))
CSA, HCA = 1, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("release")


@pytest.fixture(scope="module")
def golden(folder: Path) -> Golden:
    write_checkpoint(folder / "fp4", RAW, seed=1)
    return record(folder / "fp4", folder / "golden", RecordingOptions(tokens=TOKENS, release_code=CODE))


@pytest.fixture(scope="module")
def weights(folder: Path, golden: Golden) -> PublishedWeights:
    return PublishedWeights.open(folder / "fp4")


def test_the_golden_is_what_the_whole_model_computes(folder: Path, golden: Golden) -> None:
    """Streamed and watched, against the code's own ``Transformer`` with all of its weights, which nobody watches."""
    code = release_code.load(CODE, V4Interface.required)
    assert golden.numerics == "release"
    assert golden.manifest.request.reference.versions["model.py"] == f"sha256:{code.files['model.py']}"
    # The head evaluates the last token; every entry of the last block is there at token 139.
    np.testing.assert_array_equal(_last_logits(code, folder, TOKENS), golden.read("logits")[:, -1])


def test_code_in_the_shape_of_0731(folder: Path, golden: Golden, tmp_path: Path) -> None:
    """Its head only multiplies, and blocks collapse the streams: the golden is bit-equal to that of the other shape."""
    recorded = [
        record(
            folder / "fp4", tmp_path / code.name, RecordingOptions(tokens=TOKENS[:, :20], noise=[], release_code=code)
        )
        for code in (CODE, CODE_0731)
    ]
    assert recorded[0].manifest.taps == recorded[1].manifest.taps
    logits = recorded[1].read("logits")[:, -1]
    np.testing.assert_array_equal(
        _last_logits(release_code.load(CODE_0731, V4Interface.required), folder, TOKENS[:, :20]), logits
    )


def _last_logits(code: release_code.Code, folder: Path, tokens: np.ndarray) -> np.ndarray:
    """The logits after the last token by the code's whole model, float32 ``[B, V]``."""
    weights = PublishedWeights.open(folder / "fp4")
    with code.active():
        args = _arguments(code, weights, tokens)
        found = _filled(code, code.module.Transformer(args), weights)(torch.from_numpy(tokens))
    return (found[1] if isinstance(found, tuple) else found).float().numpy()


def _arguments(
    code: release_code.Code, weights: PublishedWeights, tokens: np.ndarray, layers: Sequence[int] = ()
) -> Any:
    """The code's arguments for a released checkpoint and a prompt."""
    prompt = PromptCalls(torch.from_numpy(tokens.astype(np.int64)), [(0, tokens.shape[1])], Path(), layers)
    return V4Interface(code, weights.config, prompt, StoredAs(fp8=True, fp4_experts=True, float_scales=False)).args


def _filled(code: release_code.Code, model: Any, weights: PublishedWeights, prefix: str = "") -> Any:
    """A module of the code, all of whose parameters are read from the checkpoint."""
    stored = weights._checkpoint
    for own, parameter in model.named_parameters():
        name = prefix + own
        array = stored.read(name)
        raw = torch.from_numpy(np.frombuffer(stored.read_bytes(name), np.uint8).copy())
        if parameter.dtype.itemsize == 1:
            parameter.data = raw.view(parameter.dtype).reshape(parameter.shape)
        elif name.endswith("wo_a.weight"):  # published in FP8, and run in bfloat16
            scale = stored.read(name.removesuffix("weight") + "scale").astype(np.float32)
            height, width = weights.config.fp8_tile
            scale = scale.repeat(height, 0)[: array.shape[0]].repeat(width, 1)[:, : array.shape[1]]
            parameter.data = torch.from_numpy(array.astype(np.float32) * scale).to(parameter.dtype)
        else:
            wide = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
            parameter.data = torch.from_numpy(wide).to(parameter.dtype)
    for part in model.modules():
        if isinstance(part, code.module.Linear) and part.scale is not None:
            part.weight.scale = part.scale
    return model


def test_parity_in_both_modes(golden: Golden, weights: PublishedWeights) -> None:
    """All taps within the floor; operation by operation nearly all values are equal to the last bit."""
    with uncompiled():  # the operations are those of the tests below, and every layer would be two programs of its own
        report = ParityRun(weights, golden, ParityOptions(modes=MODES)).run()
    assert report.passed, [result.name for result in report.taps if result.verdict is Verdict.FAIL]
    assert report.dtype == "bfloat16"
    isolated = [result for result in report.taps if result.mode is Mode.ISOLATED and result.distance is not None]
    rounded = [result for result in isolated if _is_rounded(golden.read(result.name))]
    assert len(rounded) > 60
    # One rounding of every value would be 1.7e-3.
    assert max(result.distance.relative_rms for result in rounded if result.distance) < 3e-4


def _is_rounded(values: np.ndarray) -> bool:
    return bool((np.asarray(jnp.asarray(values, jnp.bfloat16), np.float32) == values).all())


@pytest.mark.parametrize("form", ["fp8", "bf16"])
def test_other_forms_of_weights(folder: Path, form: str) -> None:
    """FP8 experts with scales that are no powers of two; and unquantised weights, whose inputs are not quantised."""
    write_checkpoint(folder / form, RAW, seed=2, form=form)  # type: ignore[arg-type]
    golden = record(
        folder / form,
        folder / f"golden-{form}",
        RecordingOptions(tokens=TOKENS[:, :30], layers=[0, 1], release_code=CODE),
    )
    report = ParityRun(PublishedWeights.open(folder / form), golden, ParityOptions(layers=[0, 1])).run()
    assert report.passed, [result.name for result in report.taps if result.verdict is Verdict.FAIL]


def _not_weighted_before(x: Any, share: Any, w1: Any, w2: Any, w3: Any, limit: float, rule: Numerics) -> Any:
    return experts.mlp(x, w1, w2, w3, limit, rule).astype(jnp.float32) * share[..., None]


def _scores_in_float32(self: Any, q: Any, keys: Any, weights: Any) -> Any:
    q, keys, weights = (part.astype(jnp.float32) for part in (q, keys, weights))
    affinity = jax.nn.relu(jnp.einsum("bshc,btc->bsht", q, keys)) * (self.head_dim * self.heads) ** -0.5
    return jnp.sum(affinity * weights[..., None], axis=2).astype(jnp.bfloat16)


FAULTS: dict[str, tuple[int, str, Any, str, Callable[..., Any]]] = {
    "inputs of matrices not quantised": (CSA, "attn.wq_a", Numerics, "input", lambda self, x: x),
    "keys not quantised": (CSA, "attn.kv_rope", Numerics, "key", lambda self, kv, rotated: kv),
    "rotated channels quantised too": (
        HCA, "attn.kv_rope", Numerics, "key", lambda self, kv, rotated: numerics.fp8_rounded(kv, 64)),
    "no Hadamard rotation": (
        CSA, "attn.indexer.q_rope", Numerics, "indexed", lambda self, x: numerics.fp4_rounded(x, 32)),
    "no FP4 in the indexer": (CSA, "attn.indexer.q_rope", Numerics, "indexed", lambda self, x: numerics.hadamard(x)),
    "FP8 in the indexer": (
        CSA, "attn.indexer.q_rope", Numerics, "indexed",
        lambda self, x: numerics.fp8_rounded(numerics.hadamard(x), 32)),
    "compressor in bfloat16": (HCA, "attn.compressor.wkv", Numerics, "wide", lambda self, x: x),
    "query norm in float32": (CSA, "attn.q", Numerics, "query", lambda self, q, eps: numerics.unit_rms(q, eps)),
    "indexer scores in float32": (CSA, "attn.indexer.scores", indexer.Indexer, "_rounded_scores", _scores_in_float32),
    "probabilities divided before they are rounded": (
        HCA, "attn.context", attention, "attend_as_released", lambda *given: attention.attend(*given[:4])),
    "routing weight after the expert": (HCA, "ffn.experts", experts, "weighted", _not_weighted_before),
    "scales that are no powers of two": (CSA, "attn.wq_a", numerics, "_power_of_two", lambda x: x),
}  # fmt: skip


@pytest.mark.parametrize("kind", [CSA, pytest.param(HCA, marks=pytest.mark.thorough)])
def test_a_step_left_out_is_named(
    golden: Golden, weights: PublishedWeights, subtests: pytest.Subtests, kind: int
) -> None:
    """One test for a layer, because the first of its steps in a process takes as long as all others together."""
    for name, (layer, tap, owner, attribute, replacement) in FAULTS.items():
        if layer != kind:
            continue
        with subtests.test(name), uncompiled(), patch.object(owner, attribute, replacement):
            report = ParityRun(weights, golden, ParityOptions(layers=[layer])).run()
            assert not report.passed
            assert f"layers.{layer}.{tap}" in [result.name for result in report.localizations[0].wrong]


def test_the_command(folder: Path, golden: Golden) -> None:
    """Recording and comparing by command; the dtype follows from the golden, and no other one is possible."""
    source, orbax, out = folder / "fp4", folder / "orbax", folder / "golden-command"
    hf_to_orbax(source, orbax, storage=Storage.SOURCE)
    run = CliRunner().invoke
    tokens = ",".join(map(str, TOKENS[0, :20]))
    asked = ["golden", "record", str(source), "--out", str(out), "--tokens", tokens, "--layers", "0"]
    done = run(app, [*asked, "--reference", "release", "--release-code", str(CODE)])
    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(
        open_golden(out).read("layers.0.attn.wq_a"), golden.read("layers.0.attn.wq_a")[:, :20]
    )
    done = run(app, ["parity", str(orbax), "--golden", str(out), "--layer", "0"])
    assert done.exit_code == 0, done.output
    assert "bfloat16" in done.output
    done = run(app, ["parity", str(orbax), "--golden", str(out), "--layer", "0", "--dtype", "float32"])
    assert done.exit_code == 2
    assert "which runs in bfloat16" in done.stderr
    assert run(app, [*asked, "--reference", "release"]).exit_code == 2
    assert run(app, [*asked, "--release-code", str(CODE)]).exit_code == 2


@pytest.mark.parametrize("options", [{"decode": 1, "greedy": True}, {"first_position": 3}, {"noise": ["float32"]}])
def test_what_the_code_is_not_recorded_with(folder: Path, golden: Golden, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        record(folder / "fp4", folder / "never", RecordingOptions(tokens=TOKENS, release_code=CODE, **options))
    assert not (folder / "never").exists()


def test_a_folder_without_the_code(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no model\.py there"):
        release_code.load(tmp_path, V4Interface.required)
    for text, complaint in (
        ("import not_there", "cannot be imported: ModuleNotFoundError"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        ("class ModelArgs: ...", "has no Transformer, Block"),
    ):
        (tmp_path / "inference").mkdir(exist_ok=True)
        (tmp_path / "inference" / "model.py").write_text(text)
        with pytest.raises(BadInput, match=complaint):
            release_code.load(tmp_path, V4Interface.required)


def test_code_that_computes_otherwise_is_an_error_not_a_golden(folder: Path, tmp_path: Path, golden: Golden) -> None:
    text = (CODE / "model.py").read_text()
    changed = text.replace("self.norm(", "self.norm.forward(", 1)  # a norm that no hook sees
    assert changed != text
    (tmp_path / "model.py").write_text(changed)
    with pytest.raises(Exception, match="not computed"):
        record(folder / "fp4", tmp_path / "golden", RecordingOptions(tokens=TOKENS, release_code=tmp_path))
    assert not (tmp_path / "golden").exists()


@pytest.mark.parametrize(
    ("wanted", "given", "message"),
    [
        ("def hc_head(", "def collapse_streams(", r"its output head: .*has no attribute 'hc_head'"),
        ("def get_logits(", "def get_last_logits(", r"its output head: "),
        ("pre = torch.sigmoid(", "pre = 1 - torch.sigmoid(-", None),
        ("def hc_post(", "def hc_after(", r"has no Block\.hc_post"),
    ],
)
def test_an_unknown_head_or_block_is_refused_before_the_first_layer(
    folder: Path, tmp_path: Path, golden: Golden, wanted: str, given: str, message: str | None
) -> None:
    text = (CODE / "model.py").read_text()
    assert wanted in text
    (tmp_path / "model.py").write_text(text.replace(wanted, given))
    steps: list[str] = []

    def step(done: int, total: int, what: str) -> None:
        steps.append(what)

    options = RecordingOptions(tokens=TOKENS[:, :3], noise=[], release_code=tmp_path)
    if message is None:  # the same in other words
        record(folder / "fp4", tmp_path / "golden", options, progress=step)
        assert "head" in steps
        return
    with pytest.raises(Dsv4Error, match=message):
        record(folder / "fp4", tmp_path / "golden", options, progress=step)
    assert steps == []
    assert not (tmp_path / "golden").exists()


def test_the_first_revision_is_known_by_its_hashes_and_its_failures_say_so(
    folder: Path, tmp_path: Path, weights: PublishedWeights, golden: Golden
) -> None:
    """The first model.py does not clamp the shared expert: parity gives that reason before it looks for others."""
    text = (CODE / "model.py").read_text()
    (tmp_path / "model.py").write_text(text.replace("swiglu_limit=limit)\n\n    def forward", ")\n\n    def forward"))
    (tmp_path / "kernel.py").write_text("never imported")
    assert (tmp_path / "model.py").read_text() != text
    named = {hashlib.sha256((tmp_path / name).read_bytes()).hexdigest(): name for name in ("model.py", "kernel.py")}
    published = dict(zip(named, release_code._REVISIONS.values(), strict=True))
    options = RecordingOptions(tokens=TOKENS[:, :20], layers=[0], noise=["bfloat16"], release_code=tmp_path)
    with patch.object(release_code, "_REVISIONS", published):
        first = record(folder / "fp4", tmp_path / "golden", options)
    versions = first.manifest.request.reference.versions
    assert {versions["model.py"], versions["kernel.py"]} == {f"sha256:{sha256}" for sha256 in named}
    assert "leaves keys and compressed entries unrounded" in versions["kernel revision"]
    report = ParityRun(weights, first, ParityOptions(layers=[0])).run()
    assert not report.passed
    cause = dict(summarized(report).lines)["Cause"]
    assert cause.startswith("The golden is of code that computes otherwise: model.py is the first, of 2026-04-24")
    assert cause.index("does not clamp the shared expert") < cause.index("shared_experts.w1")
    assert "inference` folder" in dict(summarized(report).lines)["Next"]


def test_an_interrupted_recording_goes_on(folder: Path, tmp_path: Path, golden: Golden) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        if what.startswith("layer 2"):
            raise Stop

    with pytest.raises(Stop):
        record(folder / "fp4", tmp_path / "golden", RecordingOptions(tokens=TOKENS, release_code=CODE), progress=stop)
    again = record(folder / "fp4", tmp_path / "golden", RecordingOptions(tokens=TOKENS, release_code=CODE))
    assert again.manifest.taps == golden.manifest.taps


@pytest.mark.parametrize("layer", [CSA, HCA])
def test_decoding_rounds_at_the_same_places(golden: Golden, weights: PublishedWeights, layer: int) -> None:
    """A layer on the golden's input, the last tokens one by one from its cache: nearly all values as at once.

    The last block of each kind begins before them, so its rows come out of the cache.
    """
    rounding = Numerics.of_release(golden.config)
    entering = golden.read(f"layers.{layer}.input")[:, :128]

    def taps(decode: int) -> dict[TapKey, np.ndarray]:
        model = Forward(weights, golden.tokens[:, :128], jnp.dtype("bfloat16"), decode=decode, numerics=rounding)
        return model.layer(layer, {"hc_ffn.streams": entering})[0]

    whole, parts = taps(0), taps(5)
    assert TapKey(layer, tap_named("attn.context")) in whole
    for name in ("compressor.entries", "indexer.compressor.entries", "kv_rope", "context"):
        if (full := TapKey(layer, tap_named(f"attn.{name}"))) in whole:
            assert whole[full].size
            assert (whole[full] != parts[full]).mean() < 1e-3, str(full)


#: A CSA and an HCA layer and an mtp stage; a block of both kinds becomes complete among the last tokens.
DECODING = RAW | {"num_hidden_layers": 2, "num_hash_layers": 1, "compress_ratios": [4, 128, 0]}
PREFILL, DECODE = 126, 4


@pytest.fixture(scope="module")
def decoding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoding")
    write_checkpoint(folder / "fp4", DECODING, seed=3)
    return folder


@pytest.fixture(scope="module")
def decoded(decoding: Path) -> Golden:
    """With the stage."""
    tokens = TOKENS[:, : PREFILL + DECODE]
    options = RecordingOptions(tokens=tokens, decode=DECODE, stages=True, release_code=CODE)
    return record(decoding / "fp4", decoding / "golden", options)


def test_decoding_is_recorded_from_the_codes_own_caches(decoding: Path, decoded: Golden) -> None:
    """The whole model and its mtp block, call by call, which nobody watches."""
    weights = PublishedWeights.open(decoding / "fp4")
    code = release_code.load(CODE, V4Interface.required, besides=V4Interface.of_stages(weights.config))
    config, ids = weights.config, torch.from_numpy(decoded.tokens.astype(np.int64))
    following = torch.nn.functional.pad(ids[:, 1:], (0, 1))
    calls = [(0, PREFILL), *((at, at + 1) for at in range(PREFILL, PREFILL + DECODE))]
    with code.active():
        args = _arguments(code, weights, decoded.tokens)
        model = _filled(code, code.module.Transformer(args), weights)
        stage = _filled(code, code.module.MTPBlock(config.stage_layers[0], args), weights, "mtp.0.")
        stage.embed, stage.head = model.embed, model.head
        leaving: list[torch.Tensor] = []
        model.layers[-1].register_forward_hook(lambda _, __, streams: leaving.append(streams))
        for start, stop in calls:
            logits = model(ids[:, start:stop], start)
            np.testing.assert_array_equal(logits.numpy(), decoded.read("logits")[:, stop - 1])
            drafted = stage(leaving[-1], start, following[:, start:stop])
            np.testing.assert_array_equal(drafted.numpy(), decoded.read("mtp.0.logits")[:, stop - 1])


def test_decoding_and_the_stage_agree_in_both_programs(decoding: Path, decoded: Golden) -> None:
    """Every step, and the state before the first one."""
    report = run_parity(None, decoded.path, ParityOptions(programs=tuple(Program)), source=decoding / "fp4")
    assert report.passed, verdict(report)
    assert report.arithmetic == "bfloat16 in release numerics"
    assert report.model is not None
    config = decoded.config
    state = {TapKey.of(config, layer, tap) for layer in decoded.layers for tap in state_of(config, layer)}
    assert {key.tap.name for key in state} > {"cache.compressor.overlap_gates", "cache.indexer.values"}
    for of in (report, report.model):
        assert state <= {result.key for result in of.taps}


@pytest.mark.thorough
def test_a_compact_golden_of_decoding(decoding: Path, decoded: Golden) -> None:
    """From the tokens, through every layer, the head and the stage."""
    made = shrink(decoded, decoding / "compact", Compact.of([-1, PREFILL], PREFILL + DECODE))
    options = ParityOptions(programs=[Program.STREAMED])
    report = run_parity(None, made.path, options, source=decoding / "fp4")
    assert report.passed, verdict(report)


@pytest.mark.parametrize(
    ("right", "wrong", "layer", "tap"),
    [
        # As in the published code of V4.1, where decoding reads another layer's index keys.
        ("keys = self.kv_cache[:batch, :entries]",
         "keys = self.kv_cache[:batch, :entries] if start_pos == 0 else self.kv_cache[:batch, :entries].flip(1)",
         0, "attn.indexer.scores"),
        ("state[:, :ratio] = state[:, ratio:].clone()", "pass", 0, "attn.compressor.pooled"),
        ("(start_pos + last) % window] = kv", "(start_pos + last - 1) % window] = kv", 1, "attn.kv_rope"),
    ],
    ids=["index keys of another place", "overlap not moved on", "a key in the place before"],
)  # fmt: skip
def test_a_fault_of_the_codes_cache_shows_in_decoding_only(
    decoding: Path, decoded: Golden, tmp_path: Path, right: str, wrong: str, layer: int, tap: str
) -> None:
    text = (CODE / "model.py").read_text()
    assert right in text
    (tmp_path / "model.py").write_text(text.replace(right, wrong))
    # Two blocks become complete one by one, since the second one needs the rows that the first one leaves.
    count, decode = (13, 8) if tap == "attn.compressor.pooled" else (PREFILL + DECODE, DECODE)
    options = RecordingOptions(tokens=TOKENS[:, :count], decode=decode, release_code=tmp_path)
    wrongly = record(decoding / "fp4", tmp_path / "golden", options)
    weights = PublishedWeights.open(decoding / "fp4")
    assert ParityRun(weights, wrongly, ParityOptions(layers=[layer], phase=Phase.PREFILL)).run().passed
    report = ParityRun(weights, wrongly, ParityOptions(layers=[layer], phase=Phase.DECODE)).run()
    assert f"layers.{layer}.{tap}" in {result.name for result in report.localizations[0].wrong}
