"""Random healthy models: architecture, prompt of awkward length, golden and conversion, all from one number."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from dsv4_convert.config import Config
from dsv4_convert.convert import Storage, hf_to_orbax
from dsv4_convert.converted import Weights
from dsv4_convert.golden.archive import Golden
from dsv4_convert.golden.recorder import record
from dsv4_convert.golden.synthetic import Form, random_architecture, write_checkpoint

#: Lengths around every boundary: one token, a CSA block, an HCA block, two of them, and longer than any window.
LENGTHS = (1, 3, 4, 5, 127, 128, 129, 257, 301)


@dataclasses.dataclass(frozen=True)
class Healthy:
    """What parity compares, and what it was drawn from."""

    raw: dict[str, Any]
    length: int
    weights: Weights
    golden: Golden

    @property
    def config(self) -> Config:
        """The architecture."""
        return Config.from_hf(self.raw)


def healthy(case: int, folder: Path) -> Healthy:
    """Case ``case``, made in ``folder``: checkpoint, golden and conversion."""
    draw = Random(case)
    length, batch = LENGTHS[case % len(LENGTHS)], draw.choice((1, 3))
    form: Form = draw.choice(("fp4", "fp8", "bf16"))
    storage = draw.choice((Storage.FLOAT32, Storage.SOURCE))
    if form == "fp4" and draw.random() < 0.5:
        storage = Storage.BFLOAT16  # exact there, and only there
    raw = random_architecture(case)
    write_checkpoint(folder / "hf", raw, seed=case, form=form)
    tokens = np.random.default_rng(case).integers(0, raw["vocab_size"], (batch, length)).astype(np.int32)
    golden = record(folder / "hf", folder / "golden", tokens=tokens)
    hf_to_orbax(folder / "hf", folder / "orbax", storage=storage)
    return Healthy(raw, length, Weights.open(folder / "orbax"), golden)
