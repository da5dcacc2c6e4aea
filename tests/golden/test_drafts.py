"""The reference of DSpark's stages, transformers' modules, against mlx-vlm's drafter: as recorded in
``tests/data/drafts``. Neither knows of the other, nor of dsv4's model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dsv4_convert.checkpoint.locate import open_source
from dsv4_convert.golden.layout import DTYPES, tap_shape
from dsv4_convert.golden.recorder import _resolve
from dsv4_convert.golden.references.streamed import StreamedModel
from dsv4_convert.spec.taps import TapKey, taps_of

from ..model.drafting import BATCH, LENGTHS, RECORDED, inputs, make_checkpoint

#: Largest error in units of 1e-5, absolute and relative together. Measured: 0.34.
LIMIT = 1.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("drafts") / "hf")


def drafted(folder: Path, known: int) -> dict[str, np.ndarray]:
    """Every tap of the stages, by full name, after so many known tokens."""
    streams, following = inputs(known)
    tokens = np.pad(following, ((0, 0), (1, 0)))  # only the last one, with which the block begins, is read
    found = {}
    with open_source(folder) as checkpoint:
        config = checkpoint.architecture()
        model = StreamedModel(checkpoint, config, _resolve(checkpoint, config, None), tokens)
        targets = np.pad(streams, ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0)))
        state = {
            f"float32/targets.{layer}": np.ascontiguousarray(targets[:, :, place])
            for place, layer in enumerate(config.draft_sources)
        }
        for layer in config.stage_layers:
            keys = [TapKey.of(config, layer, tap) for tap in taps_of(config, layer)]
            shapes = {key.tap.name: tap_shape(key, config, batch=BATCH, tokens=known + 1) for key in keys}
            expected = {key.tap.name: (DTYPES[key.tap.values], shapes[key.tap.name]) for key in keys}
            state, taken = model.run_layer(layer, state, expected)
            found |= taken.arrays(config.prefix(layer))
    return found


@pytest.mark.parametrize("known", LENGTHS)
def test_two_implementations_compute_the_same(folder: Path, known: int) -> None:
    prefix = f"{known}/"
    recorded = {
        name.removeprefix(prefix): value for name, value in load_file(RECORDED).items() if name.startswith(prefix)
    }
    found = drafted(folder, known)
    assert len(recorded) == 66
    errors = {}
    for name, theirs in recorded.items():
        assert found[name].shape == theirs.shape, name
        errors[name] = float((np.abs(found[name] - theirs) / (1e-5 + 1e-5 * np.abs(theirs))).max())
    assert {name: error for name, error in errors.items() if error > LIMIT} == {}
