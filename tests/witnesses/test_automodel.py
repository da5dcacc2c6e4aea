"""NeMo Automodel 0.7.0, in PyTorch: names, weights, activations, logits and the MTP stage.

Needs an environment of its own: tests/witnesses/automodel-requirements.txt. Run by ``nox -s witnesses``.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import pytest
from flax import nnx

from dsv4_convert.checkpoint import open_checkpoint
from dsv4_convert.formats.weight import decode_weight
from dsv4_convert.golden.archive import Golden, open_golden
from dsv4_convert.golden.synthetic import Form, tiny_config, write_checkpoint
from dsv4_convert.model import Model, Taps
from dsv4_convert.parity.activations import compare_activations
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.weights.published import PublishedWeights
from dsv4_convert.weights.restore import restore_model

if TYPE_CHECKING:
    from .automodel import Automodel, Tensors

pytestmark = [pytest.mark.witness, pytest.mark.filterwarnings("ignore")]

GOLDEN = Path(__file__).parents[2] / "golden" / "data" / "tiny"
TOKENS = 192
#: Largest relative error, root mean square over root mean square. Measured: 2e-7 to 8e-7.
LIMIT = 5e-6
#: Taps that no module of Automodel ends with.
OUT_OF_REACH = {"input", "attn.q", "ffn.gate.logits", "ffn.gate.scores", "hc_head.pre"}


@pytest.fixture(scope="module", autouse=True)
def torch() -> Any:
    """torch without its compiler, which takes a minute for what runs once."""
    import torch

    assert version("nemo-automodel") == "0.7.0"
    torch.compiler.set_stance("force_eager")
    return torch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of layer and an MTP stage, FP8 and FP4, with as many indexer heads as the releases."""
    folder = tmp_path_factory.mktemp("automodel") / "hf"
    write_checkpoint(folder, tiny_config(index_n_heads=64), seed=7)
    return folder


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> Automodel:
    from .automodel import Automodel

    return Automodel(checkpoint)


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, tiny_config()["vocab_size"], (2, TOKENS)).astype(np.int32)


class Ours:
    """dsv4's model on the same checkpoint and tokens: its logits, its last streams, its drafts after streams."""

    def __init__(self, checkpoint: Path, ids: np.ndarray) -> None:
        self.model: Model = restore_model(PublishedWeights.open(checkpoint), drafts=True)
        logits, streams = nnx.jit(self._run)(self.model, ids)
        self.logits, self.streams = np.asarray(logits), np.asarray(streams)

    @staticmethod
    def _run(model: Model, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        last = f"layers.{model.config.num_hidden_layers - 1}.hc_ffn.streams"
        taps = Taps(lambda name: name == last)
        return model(ids, taps=taps), taps.values[last]

    def draft(self, streams: np.ndarray, following: np.ndarray) -> np.ndarray:
        return self.draft_taps(streams, following)["mtp.0.logits"]

    def draft_taps(self, streams: np.ndarray, following: np.ndarray) -> dict[str, np.ndarray]:
        """Every tap of the MTP stage by its full name."""
        positions = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), following.shape)
        found = nnx.jit(self._draft)(self.model, streams, following, positions)
        return {name: np.asarray(value) for name, value in found.items()}

    @staticmethod
    def _draft(model: Model, streams: jax.Array, following: jax.Array, positions: jax.Array) -> dict[str, jax.Array]:
        taps = Taps(lambda name: True)
        model.draft(streams, following, positions, taps=taps)
        return taps.values


@pytest.fixture(scope="module")
def ours(checkpoint: Path, ids: np.ndarray) -> Ours:
    with jax.default_matmul_precision("highest"):
        return Ours(checkpoint, ids)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the error, relative to that of the values."""
    error = found.astype(np.float64) - expected
    return float(np.sqrt(np.mean(error**2) / np.mean(expected.astype(np.float64) ** 2)))


def decoded(folder: Path) -> dict[str, np.ndarray]:
    """The weights under their published names as dsv4 decodes them, float32; scales are gone."""
    found = {}
    with open_checkpoint(folder) as checkpoint:
        for name in checkpoint.tensors:
            scale = f"{name.removesuffix('.weight')}.scale"
            if name.endswith(".tid2eid"):
                found[name] = checkpoint.read(name)
            elif not name.endswith(".scale"):
                scales = checkpoint.read(scale) if scale in checkpoint.tensors else None
                found[name] = decode_weight(checkpoint.read(name), scales, block=(128, 128), dtype=np.dtype(np.float32))
    return found


def unlike(found: Tensors, expected: dict[str, np.ndarray]) -> list[str]:
    """Names of tensors that are on one side only, or differ in any bit of their values."""
    both = found.keys() & expected.keys()
    differing = [name for name in both if not np.array_equal(found[name].numpy(), expected[name])]
    return sorted([*(found.keys() ^ expected.keys()), *differing])


@pytest.mark.parametrize("form", ["fp4", "fp8", "bf16"])
def test_every_published_name_is_loaded_and_every_weight_is_that_of_dsv4(form: Form, tmp_path: Path) -> None:
    """As released, as the Base releases with scales that are no powers of two, and unquantised."""
    from .automodel import Automodel

    write_checkpoint(tmp_path / "hf", tiny_config(), seed=3, form=form)
    theirs, expected = Automodel(tmp_path / "hf"), decoded(tmp_path / "hf")
    assert theirs.keys.missing_keys == theirs.keys.unexpected_keys == []
    assert any(name.startswith("mtp.0.") for name in expected)
    assert unlike(theirs.exported(), expected) == []


def test_a_scale_a_name_or_an_expert_that_is_wrong_shows(checkpoint: Path) -> None:
    from .automodel import Automodel, published

    right, expected = published(checkpoint), decoded(checkpoint)
    scaled = right | {"mtp.0.e_proj.scale": 2 * right["mtp.0.e_proj.scale"].float()}
    assert unlike(Automodel(checkpoint, scaled).exported(), expected) == ["mtp.0.e_proj.weight"]
    first, second = (f"layers.1.ffn.experts.{expert}.w1.weight" for expert in (0, 1))
    swapped = right | {first: right[second], second: right[first]}
    assert unlike(Automodel(checkpoint, swapped).exported(), expected) == [first, second]
    renamed = {name.replace("layers.0.attn.wkv", "layers.0.attn.kv"): tensor for name, tensor in right.items()}
    keys = Automodel(checkpoint, renamed).keys
    assert keys.missing_keys == ["model.layers.0.self_attn.wkv.weight"]
    assert keys.unexpected_keys == ["model.layers.0.self_attn.kv.weight"]


def test_logits_and_drafts_are_those_of_dsv4(theirs: Automodel, ours: Ours, ids: np.ndarray) -> None:
    logits, streams = theirs.run(ids)
    assert relative(ours.logits, logits) < LIMIT
    assert relative(ours.streams, streams) < LIMIT
    drafted, following = theirs.draft(streams, ids)
    assert relative(ours.draft(streams, following), drafted) < LIMIT
    assert relative(ours.draft(ours.streams, following), drafted) < LIMIT


def test_every_tap_of_the_stage_is_that_of_dsv4(theirs: Automodel, ours: Ours, ids: np.ndarray) -> None:
    """From its own streams. Goldens of the stage, which transformers does not have, are held by this."""
    found, following = theirs.stage_taps(ids)
    expected = ours.draft_taps(found["mtp.0.streams"], following)
    assert {name.removeprefix("mtp.0.") for name in expected.keys() - found.keys()} == OUT_OF_REACH - {"input"}
    order = np.argsort(found["mtp.0.ffn.gate.experts"], axis=-1, kind="stable")
    ours_first = np.argsort(expected["mtp.0.ffn.gate.experts"], axis=-1, kind="stable")
    for name in ("mtp.0.ffn.gate.experts", "mtp.0.ffn.gate.weights"):
        flat = np.take_along_axis(found[name].reshape(order.shape), order, axis=-1)
        found[name], expected[name] = flat, np.take_along_axis(expected[name], ours_first, axis=-1).reshape(flat.shape)
    errors = {name: relative(value.reshape(expected[name].shape), expected[name]) for name, value in found.items()}
    assert {name: error for name, error in errors.items() if error > LIMIT} == {}


def test_in_training_it_drafts_the_same(torch: Any, theirs: Automodel, ids: np.ndarray) -> None:
    """The MTP stage as its training calls it, which the other tests call by itself."""
    drafted, _ = theirs.draft(theirs.run(ids)[1], ids)
    theirs.model.train()
    try:
        with torch.no_grad():
            (hidden,) = theirs.model(torch.tensor(ids).long()).mtp_per_depth_h
            assert np.array_equal(theirs.model.lm_head(hidden).numpy(), drafted)
    finally:
        theirs.model.eval()


def test_a_fault_shows_in_logits_and_drafts(checkpoint: Path, ours: Ours, ids: np.ndarray) -> None:
    from .automodel import Automodel, published

    right, scale = published(checkpoint), "layers.2.ffn.shared_experts.w1.scale"
    logits, _ = Automodel(checkpoint, right | {scale: 2 * right[scale].float()}).run(ids)
    assert relative(ours.logits, logits) > 1000 * LIMIT
    one, other = (f"mtp.0.{name}.weight" for name in ("enorm", "hnorm"))
    drafted, following = Automodel(checkpoint, right | {one: right[other], other: right[one]}).draft(ours.streams, ids)
    assert relative(ours.draft(ours.streams, following), drafted) > 1000 * LIMIT


class Recorded:
    """The committed golden and the checkpoint that it was recorded from."""

    def __init__(self, folder: Path) -> None:
        from .automodel import published

        write_checkpoint(folder, tiny_config(), seed=0)
        self.folder = folder
        self.golden: Golden = open_golden(GOLDEN)
        self.tensors: Tensors = published(folder)

    def report(self, model: Automodel) -> Any:
        return compare_activations(model.taps(self.golden.tokens, self.golden.shape), self.golden, mode="cumulative")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(tmp_path_factory.mktemp("recorded") / "hf")


def test_every_tap_is_that_of_transformers(recorded: Recorded) -> None:
    """Within the limits of a parity run, which are multiples of the golden's noise floor."""
    from .automodel import Automodel

    report = recorded.report(Automodel(recorded.folder))
    assert [tap.name for tap in report.taps if tap.verdict is not Verdict.PASS] == []
    within = {name: name.split(".", 2)[2] if name.startswith("layers.") else name for name in recorded.golden.names}
    assert {within[name] for name in recorded.golden.names} - {within[tap.name] for tap in report.taps} == OUT_OF_REACH
    assert {name for name in within if within[name] not in OUT_OF_REACH} == {tap.name for tap in report.taps}


def _no_yarn(model: Automodel) -> None:
    from nemo_automodel.components.models.deepseek_v4.layers import DeepseekV4RotaryEmbedding

    config = model.config
    model.model.model.rotary_emb_compress = DeepseekV4RotaryEmbedding(
        config.compress_rope_theta, config.head_dim, config.qk_rope_head_dim / config.head_dim
    )


@pytest.mark.parametrize(
    ("name", "other", "tap"),
    [
        ("layers.2.attn.wkv.scale", None, "layers.2.attn.wkv"),
        ("layers.1.ffn.experts.0.w1.weight", "layers.1.ffn.experts.1.w1.weight", "layers.1.ffn.experts"),
        ("layers.3.attn.indexer.compressor.ape", None, "layers.3.attn.indexer.compressor.pooled"),
        ("YaRN", None, "layers.1.attn.q_rope"),
    ],
)
def test_a_fault_shows_at_its_tap(recorded: Recorded, name: str, other: str | None, tap: str) -> None:
    from .automodel import Automodel

    right = recorded.tensors
    if other is not None:
        model = Automodel(recorded.folder, right | {name: right[other], other: right[name]})
    elif name in right:
        model = Automodel(recorded.folder, right | {name: 2 * right[name].float()})
    else:
        model = Automodel(recorded.folder)
        _no_yarn(model)
    failing = [result.name for result in recorded.report(model).taps if result.verdict is Verdict.FAIL]
    assert failing[0] == tap
