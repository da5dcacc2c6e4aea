"""Two small models with every kind of layer, and what transformers computes for them.

``release`` has YaRN and a clamp that bites, as the releases have. ``plain`` has the same weights without YaRN, and a
limit that no value reaches: what MaxText 0.2.5 can compute as it is. Both have the epsilons of the releases.

No witness needs torch: the logits of transformers are in ``tests/data/maxtext``. ``python -m
tests.witnesses.small_models`` records them again, with dsv4's extra ``reference`` installed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from golden.archive import open_golden
from golden.synthetic import tiny_config, write_checkpoint

LOGITS = Path(__file__).parents[1] / "data" / "maxtext" / "transformers-logits.safetensors"

#: Hash-routed: a window-only and a CSA layer; then HCA and CSA in turn, twice, so that a scan has more than one step.
_LAYERS: dict[str, Any] = {"num_hidden_layers": 6, "compress_ratios": [0, 4, 128, 4, 128, 4], "num_hash_layers": 2}
_EVERY: dict[str, Any] = {**_LAYERS, "num_nextn_predict_layers": 0, "hc_eps": 1e-6, "rms_norm_eps": 1e-6}

CONFIGS: dict[str, dict[str, Any]] = {
    "release": tiny_config(**_EVERY),
    "plain": tiny_config(**_EVERY, swiglu_limit=1e3, rope_scaling=None),
}


def write(name: str, folder: Path) -> None:
    """The model as a published checkpoint."""
    write_checkpoint(folder, CONFIGS[name], seed=3)


def tokens() -> np.ndarray:
    """The prompt: two full blocks of an HCA layer and more compressed entries than the indexer may choose."""
    return load_file(LOGITS)["tokens"]


def transformers_logits(name: str) -> np.ndarray:
    """``[B, S, V]``, in float32."""
    return load_file(LOGITS)[name]


def record() -> None:
    """Run transformers on both."""
    found: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as work:
        for name in CONFIGS:
            write(name, Path(work, name))
            command = [sys.executable, "-m", "dsv4_convert", "golden", "record", str(Path(work, name))]
            options = ["--out", str(Path(work, f"{name}-golden")), "--random", "300", "--seed", "6"]
            subprocess.run([*command, *options], check=True)
            found[name] = load_file(Path(work, f"{name}-golden", "model.safetensors"))["logits"]
            found["tokens"] = open_golden(Path(work, f"{name}-golden")).tokens
    save_file(found, LOGITS)


if __name__ == "__main__":
    record()
