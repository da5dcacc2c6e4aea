"""NeMo Automodel 0.7.0's DeepSeek-V4.1: the published names and weights of its adapter are those of dsv4.

Needs an environment of its own: tests/witnesses/automodel-requirements.txt. Run by ``nox -s witnesses``.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from dsv4_convert.checkpoint import open_checkpoint
from dsv4_convert.golden.synthetic import tiny_v41_config, write_checkpoint
from dsv4_convert.weights.published import PublishedWeights

pytestmark = [pytest.mark.witness, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("automodel") / "hf"
    write_checkpoint(folder, tiny_v41_config(), seed=7)
    return folder


def test_every_published_name_is_one_of_the_adapter(checkpoint: Path) -> None:
    """The backbone, its n-gram tables and the vision encoder; the adapter leaves scales and draft stages to others."""
    from .automodel_v41 import AutomodelV41

    assert version("nemo-automodel") == "0.7.0"
    theirs = AutomodelV41(checkpoint)
    assert (theirs.keys.missing_keys, theirs.keys.unexpected_keys) == ([], [])
    names = theirs.model.state_dict_adapter.get_hf_state_dict_keys(theirs.model.state_dict())
    with open_checkpoint(checkpoint) as opened:
        ours = {name for name in opened.tensors if not name.startswith("mtp.") and not name.endswith(".scale")}
    assert set(names) == ours


def test_every_weight_is_decoded_alike(checkpoint: Path) -> None:
    """Tiles of 32x32, rows of the tables and packed FP4, bit for bit, by the adapter's own decoder."""
    import torch
    from nemo_automodel.components.models.deepseek_v41.state_dict_adapter import dequantize_checkpoint_weight
    from safetensors.torch import load_file

    tensors = {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}
    ours = PublishedWeights.open(checkpoint)
    checked = 0
    for path, expert in [
        ("layers.1.engram.embed", None), ("layers.4.engram.wkv", None), ("layers.2.attn.indexer.wq_b", None),
        ("layers.5.attn.wq_b", None), ("layers.3.ffn.shared_experts.w2", None), ("layers.6.ffn.experts.w1", 5),
        ("mtp.0.main_proj", None), ("mtp.2.ffn.experts.w2", 3),
    ]:  # fmt: skip
        name = path if expert is None else path.replace("experts.", f"experts.{expert}.")
        found = dequantize_checkpoint_weight(
            tensors[f"{name}.weight"], tensors[f"{name}.scale"], dtype=torch.float32,
            rowwise=path.endswith("engram.embed"),
        ).numpy()  # fmt: skip
        value = ours.read(path) if expert is None else ours.read_expert(path, expert)
        assert np.array_equal(value if path.endswith("embed") else value.T, found), path
        checked += 1
    assert checked == 8
