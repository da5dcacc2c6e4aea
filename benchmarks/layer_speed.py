"""One layer forward on CPU: ours, compiled, against transformers' eager one, on the same weights and tokens.

The published config of V4-Flash at its full width, but for the number of routed experts, so that both sides' float32
weights fit the memory together. All weights are resident; compiling and the first run are not counted. The two take
turns; the median of each is compared. Needs the ``reference`` extra, 4 GB of disk and 20 GB of memory.

Run: python -m benchmarks.layer_speed [--experts 64] [--tokens 64,512,2048] [--runs 5]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from benchmarks.real_width import KINDS
from dsv4_convert.golden.synthetic import write_checkpoint
from dsv4_convert.model import Taps
from dsv4_convert.published import PublishedWeights
from dsv4_convert.restore import restore_block

FLASH = Path("tests/data/configs/DeepSeek-V4-Flash.json")
_LAYER = {"CSA, hash": (4, 1), "CSA, learned": (4, 0), "HCA, learned": (128, 0)}


def one_layer(kind: str, experts: int) -> dict[str, Any]:
    """V4-Flash with one layer of a kind, fewer experts and a small vocabulary."""
    ratio, hashed = _LAYER[kind]
    raw = json.loads(FLASH.read_text(encoding="utf-8"))
    changes = {"num_hidden_layers": 1, "compress_ratios": [ratio, 0], "num_hash_layers": hashed}
    return {**raw, **changes, "n_routed_experts": experts, "vocab_size": 4096}


class Transformers:
    """transformers' decoder layer, called as its own model calls it."""

    def __init__(self, folder: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            quantization_config=FineGrainedFP8Config(dequantize=True),
        )
        self._model.set_experts_implementation("eager")
        self._model.float().eval()

    def prepare(self, tokens: np.ndarray) -> tuple[np.ndarray, Callable[[], np.ndarray]]:
        """The streams that enter the layer for a prompt, and its forward."""
        layer = self._model.model.layers[0]
        seen: dict[str, Any] = {}

        def see(_: Any, args: Any, kwargs: Any) -> None:
            seen.update(args=args, kwargs={**kwargs, "past_key_values": None})

        handle = layer.register_forward_pre_hook(see, with_kwargs=True)
        with torch.no_grad():
            self._model(torch.from_numpy(tokens.astype(np.int64)), use_cache=False)
        handle.remove()

        def forward() -> np.ndarray:
            with torch.no_grad():
                return np.asarray(layer(*seen["args"], **seen["kwargs"]).numpy())

        return seen["args"][0].numpy(), forward


class Ours:
    """The same layer as one compiled program."""

    def __init__(self, folder: Path) -> None:
        weights = PublishedWeights.open(folder)
        self._graph, self._state = nnx.split(restore_block(weights, 0, with_experts=True))

    def prepare(self, streams: np.ndarray, tokens: np.ndarray) -> Callable[[], np.ndarray]:
        """The layer's forward on these streams; compiled already."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

        @jax.jit
        def run(state: Any, streams: jax.Array, ids: jax.Array) -> jax.Array:
            leaving, _ = nnx.merge(self._graph, state)(streams, ids, positions, Taps())
            return leaving

        entering, ids = jnp.asarray(streams), jnp.asarray(tokens, jnp.int32)
        return lambda: np.asarray(run(self._state, entering, ids))


def contest(kind: str, experts: int, lengths: list[int], runs: int, work: Path) -> list[dict[str, Any]]:
    """Both sides on one layer, for every length in turn."""
    folder = work / "hf"
    write_checkpoint(folder, one_layer(kind, experts), seed=0)
    theirs, ours = Transformers(folder), Ours(folder)
    shutil.rmtree(folder)
    rows = []
    for length in lengths:
        tokens = np.random.default_rng(length).integers(0, 4096, (1, length))
        streams, their_run = theirs.prepare(tokens)
        sides = {"transformers": their_run, "dsv4": ours.prepare(streams, tokens)}
        results = {name: side() for name, side in sides.items()}
        worst = float(np.abs(results["dsv4"] - results["transformers"]).max())
        scale = float(np.abs(results["transformers"]).max())
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(runs):
            for name, side in sides.items():
                start = time.perf_counter()
                side()
                seconds[name].append(time.perf_counter() - start)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        ratio = median["dsv4"] / median["transformers"]
        row = {"layer": kind, "tokens": length, **{name: round(value, 3) for name, value in median.items()}}
        rows.append({**row, "ratio": round(ratio, 2), "error": worst / scale})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Run the contests and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--tokens", default="64,512,2048")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kinds", default=";".join(KINDS))
    options = parser.parse_args()
    lengths = [int(length) for length in options.tokens.split(",")]
    rows = []
    for kind in options.kinds.split(";"):
        with tempfile.TemporaryDirectory() as work:
            rows += contest(kind, options.experts, lengths, options.runs, Path(work))
    table = Table(title=f"seconds for one layer, {options.experts} experts, {jax.local_device_count()} CPU", box=None)
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.1e}" if key == "error" else str(value) for key, value in row.items()))
    Console().print(table)


if __name__ == "__main__":
    main()
