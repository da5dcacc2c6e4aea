"""The noise floor: what the reference does in float64 and bfloat16, measured against runs of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dsv4_convert.errors import UsageError
from dsv4_convert.golden.archive import Golden, open_golden
from dsv4_convert.golden.noise import MODES, PEAK, RMS, Mode, row_noise
from dsv4_convert.golden.recorder import RecordingOptions, record
from dsv4_convert.golden.references import precision, widening
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.spec.tap import Values
from dsv4_convert.spec.taps import TapKey

TOKENS = np.random.default_rng(3).integers(0, 96, (2, 140)).astype(np.int32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noise") / "hf"
    write_checkpoint(folder, tiny_config(), seed=0)
    return folder


@pytest.fixture(scope="module")
def golden(checkpoint: Path) -> Golden:
    return record(checkpoint, checkpoint.parent / "golden", RecordingOptions(tokens=TOKENS))


def test_rows_by_hand() -> None:
    golden = np.zeros((1, 2, 2, 2), np.float32)
    run = golden.astype(np.float64)
    run[0, 1] = [[3, -4], [0, 0]]
    noise = row_noise(run, golden)
    assert noise.shape == (2, 1, 2)
    assert noise[RMS].tolist() == [[0, 2.5]]
    assert noise[PEAK].tolist() == [[0, 4]]
    assert row_noise(golden[:, :0], golden[:, :0]).shape == (2, 1, 0)


def test_every_real_tap_has_noise_and_no_choice_has(golden: Golden) -> None:
    for name in golden.names:
        if TapKey.parse(name).tap.values is Values.CHOICE:
            with pytest.raises(UsageError, match="is a choice"):
                golden.noise(name, "float32", Mode.ISOLATED)
            continue
        for dtype in ("float32", "bfloat16"):
            for mode in MODES:
                noise = golden.noise(name, dtype, mode)
                assert noise.shape == (2, *golden.read(name).shape[:2])
                assert (noise[RMS] <= noise[PEAK] * 1.0001).all()
    assert golden.verify() == []


def test_float32_is_rounded_much_less_than_bfloat16_and_errors_add_up(golden: Golden) -> None:
    def floor(dtype: str, mode: Mode) -> float:
        size = np.sqrt(np.mean(np.square(golden.read("layers.3.hc_ffn.streams"))))
        return float(golden.noise("layers.3.hc_ffn.streams", dtype, mode)[RMS].mean() / size)

    assert 2e-8 < floor("float32", Mode.ISOLATED) < floor("float32", Mode.CUMULATIVE) < 2e-6
    assert 1e-3 < floor("bfloat16", Mode.ISOLATED) < floor("bfloat16", Mode.CUMULATIVE) < 5e-2


def test_nothing_but_the_rotary_tables_is_float32_in_the_float64_run(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watch every tensor that a torch function makes while the reference runs in float64."""
    found: set[torch.dtype] = set()
    original = widening.Widen.__torch_function__

    def watching(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = original(self, func, types, args, kwargs)
        if not self._paused and isinstance(result, torch.Tensor) and result.is_floating_point():
            found.add((result.dtype, getattr(func, "__name__", str(func))))
        return result

    monkeypatch.setattr(widening.Widen, "__torch_function__", watching)
    record(checkpoint, tmp_path / "golden", RecordingOptions(tokens=TOKENS[:1, :20], noise=["float32"]))
    narrow = {function for dtype, function in found if dtype is not torch.float64}
    # The experts are decoded to float32 before they are widened, exactly.
    assert narrow <= {"empty", "split", "__getitem__", "__get__", "view", "chunk"}, narrow
    assert {"linear", "matmul", "softmax", "rsqrt", "sigmoid", "mul"} <= {function for _, function in found}


def test_the_float64_run_is_more_exact_than_float32(golden: Golden, checkpoint: Path) -> None:
    """A projection in float64 by NumPy: the recorded noise is the distance of the golden from it."""
    x = golden.read("layers.2.attn_norm").astype(np.float64)
    tensors = load_file(sorted(checkpoint.glob("*.safetensors"))[3])
    weight = tensors["layers.2.attn.compressor.wkv.weight"].double().numpy()
    exact = x @ weight.T
    recorded = golden.read("layers.2.attn.compressor.wkv")
    own = np.sqrt(np.mean(np.square(recorded - exact), axis=-1))
    noise = golden.noise("layers.2.attn.compressor.wkv", "float32", Mode.ISOLATED)[RMS]
    # The norm before it was rounded as well, so the two are of one size, not equal.
    assert 0.3 < np.median(own / noise) < 1.5


def test_the_bfloat16_run_is_the_model_that_users_load(tmp_path: Path) -> None:
    """Same dtypes as from_pretrained(dtype=bfloat16), and bit-equal streams where no choice could differ."""
    write_checkpoint(tmp_path / "hf", tiny_config(), seed=0, form="bf16")
    golden = record(tmp_path / "hf", tmp_path / "golden", RecordingOptions(tokens=TOKENS, noise=["bfloat16"]))

    def load(dtype: torch.dtype) -> Any:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=dtype, attn_implementation="eager")
        loaded.set_experts_implementation("eager")
        return loaded.eval()

    whole, converted = load(torch.bfloat16), load(torch.float32)
    dtypes = {name: tensor.dtype for name, tensor in whole.state_dict().items()}
    precision.change_dtype(converted.model, torch.bfloat16)
    for name, tensor in converted.model.state_dict().items():
        assert tensor.dtype == dtypes[f"model.{name}"], name

    with torch.no_grad():
        streams: list[torch.Tensor] = []
        handle = whole.model.layers[0].register_forward_hook(lambda _, args, out: streams.append(out.clone()))
        whole(torch.from_numpy(TOKENS.astype(np.int64)), use_cache=False)
        handle.remove()
    expected = row_noise(streams[0].double().numpy(), golden.read("layers.0.hc_ffn.streams"))
    assert np.array_equal(golden.noise("layers.0.hc_ffn.streams", "bfloat16", Mode.CUMULATIVE), expected)


def test_runs_follow_the_choices_of_the_golden(golden: Golden) -> None:
    """In bfloat16 the reference would choose otherwise now and then; its noise must not come from that."""
    scores = golden.read("layers.3.ffn.gate.scores")
    noise = golden.noise("layers.3.ffn.experts", "bfloat16", Mode.CUMULATIVE)[PEAK]
    size = np.abs(golden.read("layers.3.ffn.experts")).max()
    margins = np.sort(scores, axis=-1)
    assert (margins[..., -2] - margins[..., -3]).min() < 1e-2, "some choices are close"
    assert noise.max() < 0.25 * size


def test_recording_noise_does_not_change_the_golden(checkpoint: Path, golden: Golden, tmp_path: Path) -> None:
    plain = record(checkpoint, tmp_path / "plain", RecordingOptions(tokens=TOKENS, noise=()))
    for name in golden.names:
        assert np.array_equal(plain.read(name), golden.read(name)), name
    with pytest.raises(UsageError, match=r"carries no noise floor of bfloat16, only of .*--noise bfloat16"):
        open_golden(plain.path).noise("layers.0.attn.q", "bfloat16", Mode.ISOLATED)
    with pytest.raises(UsageError, match="--noise float16: expected some of float32, bfloat16"):
        record(checkpoint, tmp_path / "x", RecordingOptions(tokens=TOKENS, noise=["float16"]))
