"""Recording: the streamed reference is the whole model, bit for bit; goldens are exact, resumable and checked."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from dsv4_convert.errors import BadInput, Dsv4Error, ResourceError, UsageError
from dsv4_convert.golden.archive import Golden, open_golden
from dsv4_convert.golden.noise import Mode
from dsv4_convert.golden.plan import RecordingPlan
from dsv4_convert.golden.recorder import RecordingOptions, record
from dsv4_convert.golden.references.probes import (
    HEAD_PROBES,
    LAYER_PROBES,
    FirstArgument,
    Input,
    Output,
    _split_channels,
    _split_tokens,
    recording,
)
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.taps import TapKey, taps_of
from dsv4_convert.weights.published import PublishedWeights

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 140)).astype(np.int32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same architecture as released, as Base, and as transformers saves it."""
    root = tmp_path_factory.mktemp("sources")
    write_checkpoint(root / "fp4", tiny_config(), seed=0)
    write_checkpoint(root / "fp8", tiny_config(), seed=0, form="fp8")
    fresh = AutoModelForCausalLM.from_config(_whole(root / "fp4").config)
    fresh.load_state_dict(_whole(root / "fp4").state_dict())
    fresh.save_pretrained(root / "saved")
    return {folder.name: folder for folder in root.iterdir()}


def _whole(folder: Path) -> torch.nn.Module:
    """The model as a user of transformers loads it, decoded by transformers itself, in float32."""
    quantised = {} if folder.name == "saved" else {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **quantised)
    model.set_experts_implementation("eager")
    return model.float().eval()


@pytest.mark.parametrize("source", ["fp4", "fp8", "saved"])
def test_streamed_is_the_whole_model_bit_for_bit(folders: dict[str, Path], tmp_path: Path, source: str) -> None:
    golden = record(folders[source], tmp_path / "golden", RecordingOptions(tokens=TOKENS))
    model = _whole(folders[source])
    streams: list[np.ndarray[Any, Any]] = []
    handles = [
        layer.register_forward_hook(lambda _, args, out: streams.append(out.numpy().copy()))
        for layer in model.model.layers
    ]
    logits = _logits(model)
    for layer, expected in enumerate(streams):
        assert np.array_equal(golden.read(f"layers.{layer}.hc_ffn.streams"), expected), layer
    assert np.array_equal(golden.read("logits"), logits)
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1

    # Now with every probe on the whole model: the same taps, and watching has not changed the result.
    for handle in handles:
        handle.remove()
    with ExitStack() as stack:
        taps = {
            layer: stack.enter_context(recording(module, probes, _expected(golden, layer)))
            for layer, module, probes in (
                *((layer, module, LAYER_PROBES) for layer, module in enumerate(model.model.layers)),
                (None, model.model, HEAD_PROBES),
            )
        }
        assert np.array_equal(_logits(model), logits)
    for layer, found in taps.items():
        for name, value in found.items():
            full = name if layer is None else f"layers.{layer}.{name}"
            assert np.array_equal(golden.read(full), value), full


def _logits(model: torch.nn.Module) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS.astype(np.int64)), use_cache=False).logits.numpy()


def _expected(golden: Golden, layer: int | None) -> dict[str, Any]:
    """The taps that the probes of one layer, or of the head, must find; embedding and logits are not theirs."""
    arrays = golden.manifest.request.arrays()
    wanted = {key.tap.name: arrays[str(key)] for key in golden.taps(layer)}
    return {name: (array.dtype, array.shape) for name, array in wanted.items() if name not in ("embed", "logits")}


@pytest.fixture(scope="module")
def golden(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return record(folders["fp4"], tmp_path_factory.mktemp("golden") / "g", RecordingOptions(tokens=TOKENS))


def test_every_tap_is_there_in_order_of_execution(golden: Golden) -> None:
    config = Config.from_hf(tiny_config())
    for layer in range(config.num_hidden_layers):
        assert golden.taps(layer) == tuple(TapKey(layer, tap) for tap in taps_of(config, layer))
        for key in golden.taps(layer):
            array = golden.read(key)
            assert np.isfinite(array).all(), key
            assert array.size, key
    assert golden.verify() == []
    assert np.array_equal(golden.tokens, TOKENS)


def test_a_layer_enters_with_what_the_layer_before_left(golden: Golden) -> None:
    assert np.array_equal(golden.read("layers.2.input"), golden.read("layers.1.hc_ffn.streams"))
    stored = {entry.file for entry in golden.manifest.taps.values()}
    assert "layers.2.input" in golden.manifest.aliases
    assert stored == {*(f"layer-{layer:05d}.safetensors" for layer in range(4)), "model.safetensors"}


def test_taps_hang_together(golden: Golden) -> None:
    """Relations that hold by the mathematics, so that a tap taken at the wrong place shows."""
    read: Callable[[str], Any] = lambda name: golden.read(f"layers.1.{name}").astype(np.float64)  # noqa: E731
    entering, pre = read("input"), read("hc_attn.pre")
    np.testing.assert_allclose(read("hc_attn.collapsed"), (pre[..., None] * entering).sum(2), atol=1e-5)
    mixed = np.einsum("bsjk,bsjd->bskd", read("hc_attn.comb"), entering)
    spread = read("hc_attn.post")[..., None] * read("attn.wo_b")[:, :, None]
    np.testing.assert_allclose(read("hc_attn.streams"), spread + mixed, atol=1e-5)
    np.testing.assert_allclose(read("ffn"), read("ffn.experts") + read("ffn.shared_experts"), atol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(read("attn.q_rope"), axis=-1), np.linalg.norm(read("attn.q"), axis=-1), rtol=1e-5
    )
    # Each division by a sum of about 1 adds hc_eps to it.
    np.testing.assert_allclose(read("hc_attn.comb").sum(2), 1, atol=2 * golden.config.hc_eps)
    np.testing.assert_allclose(read("ffn.gate.weights").sum(-1), 1.5, atol=1e-5)
    affinity = np.sqrt(np.log1p(np.exp(read("ffn.gate.logits"))))
    shares = np.take_along_axis(affinity, golden.read("layers.1.ffn.gate.experts"), axis=-1)
    np.testing.assert_allclose(read("ffn.gate.weights"), 1.5 * shares / shares.sum(-1, keepdims=True), atol=1e-5)
    experts = golden.read("layers.1.ffn.gate.experts")
    assert (np.diff(experts, axis=-1) > 0).all(), "ascending and distinct"
    chosen = golden.read("layers.1.attn.indexer.chosen")
    visible = (np.arange(140) + 1) // 4
    assert ((chosen >= 0).sum(-1) == np.minimum(visible, 5)).all()
    assert (chosen < visible[None, :, None]).all()
    learned = golden.read("layers.3.ffn.gate.scores").argsort(-1)[..., -2:]
    assert np.array_equal(np.sort(learned), golden.read("layers.3.ffn.gate.experts"))


def test_module_names_and_fused_experts_give_the_same_golden(
    folders: dict[str, Path], golden: Golden, tmp_path: Path
) -> None:
    """The attribute names of transformers' modules, as other tools write them, with all experts in one tensor."""
    model = _whole(folders["fp4"])
    source = tmp_path / "module"
    source.mkdir()
    shutil.copy(folders["saved"] / "config.json", source)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, source / "model.safetensors")
    again = record(source, tmp_path / "golden", RecordingOptions(tokens=TOKENS))
    for name in golden.names:
        assert np.array_equal(again.read(name), golden.read(name)), name
    experts = next(name for name in tensors if name.endswith("1.mlp.experts.gate_up_proj"))
    tensors[experts][2, 3, 5] = torch.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(BadInput, match=r"experts\.gate_up_proj: the value at \[3, 5\] is NaN"):
        PublishedWeights.open(source).read_expert("layers.1.ffn.experts.w1", 2)


def test_the_head_in_pieces_gives_the_same_logits(
    folders: dict[str, Path], golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsv4_convert.golden.references import streamed

    monkeypatch.setattr(streamed, "HEAD_ROWS", 40)  # of 96: two whole pieces and a shorter one
    pieces = record(folders["fp4"], tmp_path / "golden", RecordingOptions(tokens=TOKENS))
    np.testing.assert_allclose(pieces.read("logits"), golden.read("logits"), atol=1e-5)


def test_the_plan_is_what_happens(folders: dict[str, Path], tmp_path: Path) -> None:
    plans: list[RecordingPlan] = []
    done = record(
        folders["fp4"], tmp_path / "golden", RecordingOptions(tokens=TOKENS, layers=[0, 1, 3]), announce=plans.append
    )
    (plan,) = plans
    arrays = [array for file in done.path.glob("*.safetensors") for array in load_file(file).values()]
    assert plan.bytes_written == sum(array.nbytes for array in arrays)
    assert plan.bytes_written < sum(file.stat().st_size for file in done.path.glob("*.safetensors"))
    shards = [folders["fp4"] / name for name in done.manifest.request.source.files]
    assert 0 < sum(shard.stat().st_size for shard in shards) - plan.bytes_read < 100_000, "headers, and mtp"
    assert plan.memory > plan.bytes_written / 4


def test_a_full_disk_is_said_before_the_first_layer(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ResourceError, match="1,000 are free"):
        record(
            folders["fp4"],
            tmp_path / "deep" / "golden",
            RecordingOptions(tokens=TOKENS),
            progress=lambda done, total, what: said.append(what),
        )
    assert not any("layer" in what for what in said)


@pytest.mark.parametrize("length", [1, 3, 4, 127])
def test_short_prompts_have_empty_taps_not_missing_ones(folders: dict[str, Path], tmp_path: Path, length: int) -> None:
    golden = record(folders["fp4"], tmp_path / "golden", RecordingOptions(tokens=TOKENS[0, :length]))
    assert golden.tokens.shape == (1, length)
    assert golden.read("layers.1.attn.compressor.entries").shape == (1, length // 4, 16)
    assert golden.read("layers.2.attn.compressor.entries").shape == (1, 0, 16)
    assert golden.read("layers.1.attn.indexer.chosen").shape == (1, length, min(5, length // 4))


def test_chosen_layers_only_and_no_head_before_the_end(
    folders: dict[str, Path], golden: Golden, tmp_path: Path
) -> None:
    part = record(folders["fp4"], tmp_path / "part", RecordingOptions(tokens=TOKENS, layers=[1]))
    assert part.layers == (1,)
    assert "logits" not in part.names
    assert part.taps(1)
    for key in part.taps(1):
        assert np.array_equal(part.read(key), golden.read(key)), key


def test_an_interrupted_recording_goes_on(
    folders: dict[str, Path], golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsv4_convert.golden.references import streamed

    ran: list[int] = []
    original = streamed.StreamedModel.run_layer

    def failing(self: Any, layer: int, *rest: Any) -> Any:
        ran.append(layer)
        if ran == [0, 1, 2]:
            raise KeyboardInterrupt
        return original(self, layer, *rest)

    monkeypatch.setattr(streamed.StreamedModel, "run_layer", failing)
    with pytest.raises(KeyboardInterrupt):
        record(folders["fp4"], tmp_path / "golden", RecordingOptions(tokens=TOKENS))
    assert not (tmp_path / "golden").exists()
    again = record(folders["fp4"], tmp_path / "golden", RecordingOptions(tokens=TOKENS))
    assert ran == [0, 1, 2, 2, 3], "finished layers are not run again"
    for name in golden.names:
        assert np.array_equal(again.read(name), golden.read(name)), name


def test_another_request_is_refused_and_what_an_interrupted_one_left_stays(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsv4_convert.golden.references import streamed

    with monkeypatch.context() as patch:
        patch.setattr(streamed.StreamedModel, "run_head", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            record(folders["fp4"], tmp_path / "golden", RecordingOptions(tokens=TOKENS))
    stage = tmp_path / "golden.dsv4-partial"
    left = {file.name: file.read_bytes() for file in stage.iterdir()}
    assert len(left) > 3
    with pytest.raises(UsageError, match=r"(?s)an unfinished recording with other settings.*tokens: .* then.*remove"):
        record(folders["fp4"], tmp_path / "golden", RecordingOptions(tokens=TOKENS[:1, :20]))
    assert {file.name: file.read_bytes() for file in stage.iterdir()} == left
    assert record(folders["fp4"], tmp_path / "golden", RecordingOptions(tokens=TOKENS)).verify() == []


def test_a_changed_reference_is_an_error_and_never_a_golden(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a later transformers did not call the function that a probe watches."""
    from dsv4_convert.golden.references import probes

    monkeypatch.setitem(probes.LAYER_PROBES, "hc_attn.pre", probes.FirstArgument("attn_hc", torch.erf))
    with pytest.raises(Dsv4Error, match=r"hc_attn\.pre: not computed"):
        record(folders["fp4"], tmp_path / "golden", RecordingOptions(tokens=TOKENS))
    assert not (tmp_path / "golden").exists()


@pytest.mark.parametrize(
    ("tap", "probe", "problem"),
    [
        ("attn.wq_a", Output("self_attn.q_proj"), "there is no module self_attn.q_proj"),
        ("attn.wq_a", Output("self_attn.q_a_norm.weight"), "there is no module"),
        ("attn.wq_a", Output("self_attn.o_b_proj"), r"expected float32 \[2, 140, 16\], found .*\[2, 140, 32\]"),
        ("attn.q", Output("self_attn.q_b_norm"), r"found torch.float32 \[2, 2, 140, 16\]"),
        ("attn.q", Output("self_attn.q_a_norm", layout=_split_channels), "expected float32"),
        ("hc_attn.post", Output("attn_hc", 3), "expected a tensor, found NoneType"),
        ("hc_attn.post", Output("attn_hc"), "expected a tensor, found tuple"),
        ("hc_attn.streams", Input("ffn_hc", 1), "expected a tensor, found NoneType"),
        ("hc_attn.pre", FirstArgument("attn_hc", torch.Tensor.view), "computed more than once"),
        ("ffn.gate.experts", Output("mlp.gate", 1, _split_tokens), "expected int32"),
    ],
)
def test_what_a_probe_finds_has_to_be_the_tap(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tap: str, probe: Any, problem: str
) -> None:
    monkeypatch.setitem(LAYER_PROBES, tap, probe)
    with pytest.raises(Dsv4Error, match=rf"{re.escape(tap)}: .*{problem}"):
        record(folders["fp4"], tmp_path / "golden", RecordingOptions(tokens=TOKENS))


@pytest.mark.parametrize(
    ("package", "version", "problem"),
    [
        ("transformers", "5.22.1", "knows releases >=5.23,<5.25, found 5.22.1"),
        ("transformers", "5.25.0", "knows releases >=5.23,<5.25, found 5.25.0"),
        ("transformers", None, "transformers is missing"),
        ("torch", None, "torch is missing"),
    ],
)
def test_without_the_right_reference_it_says_what_to_install(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    version: str | None,
    problem: str,
) -> None:
    real = metadata.version

    def pretended(name: str) -> str:
        if name == package and version is None:
            raise metadata.PackageNotFoundError(name)
        return version if name == package and version is not None else real(name)

    monkeypatch.setattr(metadata, "version", pretended)
    with pytest.raises(UsageError, match=rf"{problem}.*dsv4-convert\[reference\]"):
        record(folders["fp4"], tmp_path / "golden", RecordingOptions(tokens=TOKENS))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damage_is_noticed(folders: dict[str, Path], tmp_path: Path, damage: str) -> None:
    record(folders["fp4"], tmp_path / "golden", RecordingOptions(tokens=TOKENS[:1, :20]))
    file = tmp_path / "golden" / ("manifest.json" if damage == "manifest" else "layer-00001.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[:-1])
    else:
        content[-100] ^= 1
        file.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        _read_everything(tmp_path / "golden")
    assert str(tmp_path / "golden") in str(caught.value)


def _read_everything(path: Path) -> None:
    opened = open_golden(path)
    for name in opened.names:
        if opened.read(name).dtype == np.float32:
            opened.noise(name, "float32", Mode.ISOLATED)


def test_impossible_requests(folders: dict[str, Path], golden: Golden, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="outside the vocabulary of 96"):
        record(folders["fp4"], tmp_path / "x", RecordingOptions(tokens=np.array([[96]])))
    with pytest.raises(UsageError, match="exists already"):
        record(folders["fp4"], golden.path, RecordingOptions(tokens=TOKENS))
    with pytest.raises(UsageError, match="layers 0 to 3"):
        record(folders["fp4"], tmp_path / "x", RecordingOptions(tokens=TOKENS, layers=[4]))
    with pytest.raises(UsageError, match="no tap"):
        golden.read("layers.0.attn.wq_c")
