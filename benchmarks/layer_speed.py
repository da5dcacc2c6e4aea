"""One layer forward on CPU: ours, compiled, against transformers' eager one, on the same weights and tokens.

The published config of V4-Flash at its full width, but for the number of routed experts, so that both sides' float32
weights fit the memory together. All weights are resident; compiling and the first run are not counted. The two take
turns; the median of each is compared, and the least processor time. Needs the ``reference`` extra, 4 GB of disk and
20 GB of memory; with 16 experts 1 GB and 7 GB.

Run: python -m benchmarks.layer_speed [--experts 64] [--tokens 64,512,2048] [--dtype float32,bfloat16] [--runs 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from rich.console import Console
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from benchmarks.measure import in_turns, table_of
from dsv4_convert.golden.synthetic import write_checkpoint
from dsv4_convert.model import Taps
from dsv4_convert.weights.published import PublishedWeights
from dsv4_convert.weights.restore import restore_block

FLASH = Path("tests/data/configs/DeepSeek-V4-Flash.json")
#: ``compress_ratios`` and ``num_hash_layers`` of one layer of each kind.
KINDS = {
    f"{attention}, {routing}": (ratio, hashed)
    for attention, ratio in (("sliding", 0), ("CSA", 4), ("HCA", 128))
    for routing, hashed in (("hash", 1), ("learned", 0))
}


def one_layer(kind: str, experts: int) -> dict[str, Any]:
    """V4-Flash with one layer of a kind, fewer experts and a small vocabulary."""
    ratio, hashed = KINDS[kind]
    raw = json.loads(FLASH.read_text(encoding="utf-8"))
    changes = {"num_hidden_layers": 1, "compress_ratios": [ratio, 0], "num_hash_layers": hashed}
    return {**raw, **changes, "n_routed_experts": experts, "vocab_size": 4096}


class Transformers:
    """transformers' decoder layer, called as its own model calls it."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            quantization_config=FineGrainedFP8Config(dequantize=True),
        )
        self._model.set_experts_implementation("eager")
        if dtype == "float32":
            self._model.float()
        self._model.eval()

    def prepare(self, tokens: np.ndarray) -> tuple[np.ndarray, Callable[[], np.ndarray]]:
        """The streams that enter the layer for a prompt, and its forward."""
        layer = self._model.model.layers[0]
        seen: dict[str, Any] = {}

        def see(_: Any, args: Any, kwargs: Any) -> None:
            seen.update(args=args, kwargs=kwargs)

        handle = layer.register_forward_pre_hook(see, with_kwargs=True)
        with torch.no_grad():
            self._model(torch.from_numpy(tokens.astype(np.int64)), use_cache=False)
        handle.remove()

        def forward() -> np.ndarray:
            with torch.no_grad():
                return np.asarray(layer(*seen["args"], **seen["kwargs"]).float().numpy())

        return seen["args"][0].float().numpy(), forward


class Ours:
    """The same layer as one compiled program."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self._dtype = np.dtype(jnp.dtype(dtype))
        weights = PublishedWeights.open(folder)
        self._graph, self._state = nnx.split(restore_block(weights, 0, with_experts=True, dtype=self._dtype))

    def prepare(self, streams: np.ndarray, tokens: np.ndarray) -> Callable[[], np.ndarray]:
        """The layer's forward on these streams; compiled already."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

        @jax.jit
        def run(state: Any, streams: jax.Array, ids: jax.Array) -> jax.Array:
            leaving, _ = nnx.merge(self._graph, state)(streams, ids, positions, Taps())
            return leaving.astype(jnp.float32)

        entering, ids = jnp.asarray(streams, self._dtype), jnp.asarray(tokens, jnp.int32)
        return lambda: np.asarray(run(self._state, entering, ids))


def contest(folder: Path, dtype: str, lengths: list[int], runs: int) -> Iterator[dict[str, Any]]:
    """Both sides on the layer of a checkpoint, for every length in turn."""
    theirs, ours = Transformers(folder, dtype), Ours(folder, dtype)
    for length in lengths:
        tokens = np.random.default_rng(length).integers(0, 4096, (1, length))
        streams, their_run = theirs.prepare(tokens)
        sides = {"transformers": their_run, "dsv4": ours.prepare(streams, tokens)}
        results = {name: side() for name, side in sides.items()}
        worst = float(np.abs(results["dsv4"] - results["transformers"]).max())
        scale = float(np.abs(results["transformers"]).max())
        elapsed, processor = in_turns(sides, runs)
        median = {name: round(statistics.median(values), 3) for name, values in elapsed.items()}
        yield {
            **median,
            "ratio": round(median["dsv4"] / median["transformers"], 2),
            "of processor time": round(min(processor["dsv4"]) / min(processor["transformers"]), 2),
            "error": float(f"{worst / scale:.1e}"),
        }


def rows_of(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of all kinds, dtypes and lengths that were asked for."""
    lengths = [int(length) for length in options.tokens.split(",")]
    for kind in options.kinds.split(";"):
        with tempfile.TemporaryDirectory() as work:
            write_checkpoint(Path(work) / "hf", one_layer(kind, options.experts), seed=0)
            for dtype in options.dtype.split(","):
                found = contest(Path(work) / "hf", dtype, lengths, options.runs)
                for length, row in zip(lengths, found, strict=True):
                    yield {"layer": kind, "dtype": dtype, "tokens": length, **row}


def main() -> None:
    """Run the contests and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--tokens", default="64,512,2048")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kinds", default=";".join(KINDS))
    parser.add_argument("--dtype", default="float32,bfloat16")
    options = parser.parse_args()
    rows = []
    for row in rows_of(options):
        print(json.dumps(row), flush=True)
        rows.append(row)
    title = f"seconds for one layer, {options.experts} experts, {jax.local_device_count()} CPU"
    Console().print(table_of(title, rows))


if __name__ == "__main__":
    main()
