"""A small V4.1, and what its draft stages read: the same for dsv4 and for the implementation that it is compared with.

The fixture beside this module's tests was recorded with NeMo Automodel 0.7.0, in the environment of its witness:

    python -m tests.witnesses.automodel_v41_drafts
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dsv4_convert.golden.synthetic import tiny_v41_config

Array = np.ndarray[Any, Any]

RECORDED = Path(__file__).parents[1] / "data" / "v41" / "automodel_drafts.safetensors"
CONFIG, SEED = tiny_v41_config(), 0
BATCH = 1
#: Known tokens at a draft: fewer than the window of 16, and more.
LENGTHS = (7, 37)


def inputs(tokens: int) -> tuple[Array, Array]:
    """Streams of the target layers ``[B, S, T, N, D]``, and the token that follows each token ``[B, S]``."""
    text = CONFIG["text_config"]
    rng = np.random.default_rng(tokens)
    shape = (BATCH, tokens, len(text["dspark_target_layer_ids"]), text["hc_mult"], text["hidden_size"])
    streams = rng.standard_normal(shape).astype(np.float32)
    return streams, rng.integers(0, text["vocab_size"], (BATCH, tokens)).astype(np.int32)
