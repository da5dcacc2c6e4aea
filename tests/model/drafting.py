"""A tiny dated release, and what its DSpark stages read: the same for dsv4 and for the implementation that it is
compared with.

The fixture beside this module's tests was recorded with mlx-vlm 0.7.10, in the environment of its witness:

    python -m tests.model.drafting tests/data/drafts/dspark.safetensors
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_convert.golden.synthetic import dspark_config, write_checkpoint

Array = np.ndarray[Any, Any]

RECORDED = Path(__file__).parents[1] / "data" / "drafts" / "dspark.safetensors"
BATCH = 2
#: Known tokens at a draft: fewer than the window of 16, as many, and more.
LENGTHS = (7, 16, 37)


def make_checkpoint(folder: Path) -> Path:
    """Unquantised weights, whose bytes depend on nothing but the seed."""
    write_checkpoint(folder, dspark_config(), seed=7, form="bf16")
    return folder


def inputs(tokens: int) -> tuple[Array, Array]:
    """Streams leaving the target layers ``[B, S, T, N, D]``, and the token that follows each token ``[B, S]``."""
    raw = dspark_config()
    rng = np.random.default_rng(tokens)
    shape = (BATCH, tokens, len(raw["dspark_target_layer_ids"]), raw["hc_mult"], raw["hidden_size"])
    streams = rng.standard_normal(shape).astype(np.float32)
    return streams, rng.integers(0, raw["vocab_size"], (BATCH, tokens)).astype(np.int32)


def record(out: Path) -> None:
    """Every activation of mlx-vlm's drafter, by length and tap."""
    from importlib.metadata import version

    from safetensors.numpy import save_file

    from tests.witnesses.mlx_drafts import Drafter

    found = {}
    with tempfile.TemporaryDirectory() as work:
        folder = make_checkpoint(Path(work) / "hf")
        for tokens in LENGTHS:
            streams, following = inputs(tokens)
            features = streams.mean(axis=3).reshape(BATCH, tokens, -1)
            taps = Drafter(folder).run(features, following)
            found |= {f"{tokens}/{name}": np.ascontiguousarray(value) for name, value in taps.items()}
    about = {"mlx-vlm": version("mlx-vlm"), "mlx": version("mlx"), "lengths": json.dumps(LENGTHS)}
    save_file(found, out, metadata=about)


if __name__ == "__main__":
    record(Path(sys.argv[1]))
