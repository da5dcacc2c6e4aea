"""mlx-vlm 0.7.10, in MLX: names of a DSpark draft, and the recording of its activations that dsv4's tests compare with.

Needs an environment of its own: tests/witnesses/mlx-requirements.txt. Run by ``nox -s witnesses``.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ..model.drafting import BATCH, LENGTHS, RECORDED, inputs, make_checkpoint

pytestmark = [pytest.mark.witness, pytest.mark.filterwarnings("ignore")]

#: Largest difference, absolute and relative, of two runs of mlx on other processors.
LIMIT = 2e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert version("mlx-vlm") == "0.7.10"
    return make_checkpoint(tmp_path_factory.mktemp("mlx") / "hf")


def test_every_name_of_a_draft_has_a_place_in_the_other_implementation(folder: Path) -> None:
    """Both ways; its adapter drops the confidence head, which it does not use."""
    from .mlx_drafts import Drafter

    assert Drafter(folder).unlike == set()


def test_the_recording_is_what_it_computes(folder: Path) -> None:
    from .mlx_drafts import Drafter

    recorded = load_file(RECORDED)
    found = {}
    for tokens in LENGTHS:
        streams, following = inputs(tokens)
        features = streams.mean(axis=3).reshape(BATCH, tokens, -1)
        found |= {f"{tokens}/{name}": value for name, value in Drafter(folder).run(features, following).items()}
    assert found.keys() == recorded.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, recorded[name], atol=LIMIT, rtol=LIMIT, err_msg=name)
