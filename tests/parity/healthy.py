"""Random healthy models: architecture, prompt of awkward length, golden and conversion, all from one number."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from dsv4_convert.convert import Storage, hf_to_orbax
from dsv4_convert.golden.archive import Golden
from dsv4_convert.golden.recorder import RecordingOptions, record
from dsv4_convert.golden.synthetic import Form, random_architecture, write_checkpoint
from dsv4_convert.spec.config import Config
from dsv4_convert.weights.converted import Weights

#: Lengths around every boundary: one token, a CSA block, an HCA block, two of them, and longer than any window.
LENGTHS = (1, 3, 4, 5, 127, 128, 129, 257, 301)


@dataclasses.dataclass(frozen=True)
class Healthy:
    """Two sides for parity to compare, and the draw that they came from."""

    raw: dict[str, Any]
    length: int
    weights: Weights
    golden: Golden

    @property
    def config(self) -> Config:
        """The architecture."""
        return Config.from_hf(self.raw)


def healthy(case: int, folder: Path, noise: Sequence[str] | None = None) -> Healthy:
    """Case ``case``, made in ``folder``: checkpoint, golden with the floors of these dtypes, and conversion."""
    draw = Random(case)
    length, batch = LENGTHS[case % len(LENGTHS)], draw.choice((1, 3))
    form: Form = draw.choice(("fp4", "fp8", "bf16"))
    storage = draw.choice((Storage.FLOAT32, Storage.SOURCE))
    if form == "fp4" and draw.random() < 0.5:
        storage = Storage.BFLOAT16  # exact there, and only there
    raw = random_architecture(case)
    write_checkpoint(folder / "hf", raw, seed=case, form=form)
    tokens = np.random.default_rng(case).integers(0, raw["vocab_size"], (batch, length)).astype(np.int32)
    golden = record(folder / "hf", folder / "golden", RecordingOptions(tokens=tokens, noise=noise))
    hf_to_orbax(folder / "hf", folder / "orbax", storage=storage)
    return Healthy(raw, length, Weights.open(folder / "orbax"), golden)
