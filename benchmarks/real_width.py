"""Golden and parity at the real width of V4-Flash, V4-Pro and V4.1-Flash: time and peak memory of each step.

Small models at the published widths, with random weights in the published format. V4's has three layers: CSA with hash
routing, CSA with learned routing, HCA with learned routing. V4-Flash needs about 25 GB of disk, V4-Pro 65 GB. V4.1
has a model for each kind of layer, one after the other: the layer, and the one that makes what it reads. Each needs up
to 25 GB. Tables of n-grams have their full size, 98 GB each, in sparse files: the rows that the prompt looks up are
random, the others are zeros. They are converted with --compression zstd, in which zeros take no room.

Recording needs the ``reference`` extra; that of V4.1 needs ``--release-code``, a copy of its ``inference`` folder.

Run: python -m benchmarks.real_width [--config tests/data/configs/DeepSeek-V4-Pro.json] [--work DIR] [--tokens 256]
[--release-code DIR] [NAME ...]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import dsv4, gigabytes
from benchmarks.sparse import write_shard
from dsv4_convert.checkpoint import TensorEntry, open_checkpoint
from dsv4_convert.golden import synthetic
from dsv4_convert.model.v41.engram import ngram_rows
from dsv4_convert.spec.v41.config import V41Config
from dsv4_convert.spec.v41.ngrams import ngram_hash
from dsv4_convert.weights.token_map import token_map

Raw = Mapping[str, Any]


class Model(NamedTuple):
    """A small model: its name, its config, and the layers that are converted and compared."""

    name: str
    config: Raw
    layers: tuple[int, ...]

    @property
    def has_table(self) -> bool:
        """Whether a layer has an n-gram table."""
        return bool(self.config.get("text_config", {}).get("engram_layer_ids"))


#: The layers of V4's model.
KINDS = ("CSA, hash", "CSA, learned", "HCA, learned")
#: Kind of a layer of V4.1 -> layers of the published model: those that make what it reads, then one of the kind.
V41_KINDS = {
    "window": (0,),
    "window, n-grams": (1,),
    "pairs, source": (2,),
    "pairs, reader": (2, 3),
    "pairs, source, n-grams": (14,),
    "tokens, source": (20,),
    "tokens, reader": (20, 21),
    "tokens, chooser": (20, 24),
}


def models(config: Path, experts: int | None) -> Iterator[Model]:
    """The models of the published ``config``, with its number of routed experts or another one."""
    raw = json.loads(config.read_text(encoding="utf-8"))
    fewer = {} if experts is None else {"n_routed_experts": experts}
    if raw["model_type"] == "deepseek_v41":
        for name, layers in V41_KINDS.items():
            yield Model(name, _some_layers(raw["text_config"] | fewer, layers), (len(layers) - 1,))
        return
    three = {"num_hidden_layers": 3, "compress_ratios": [4, 4, 128, 0], "num_hash_layers": 1}
    yield Model("; ".join(KINDS), raw | three | fewer, (0, 1, 2))


def _some_layers(text: Raw, layers: tuple[int, ...]) -> Raw:
    """The config of V4.1 that has only these layers, with a random tokenizer, and the sizes that follow from it."""
    own = {
        "num_hidden_layers": len(layers),
        "compress_ratios": [text["compress_ratios"][layer] for layer in layers] + [0],
        "num_nextn_predict_layers": 1,
        "dspark_target_layer_ids": [0],
        "dspark_n_routed_experts": text["dspark_num_experts_per_tok"],
        "candidate_source_layer_id": -1,
    }
    for name in ("kv_source_layer_ids", "index_source_layer_ids", "engram_layer_ids"):
        own[name] = [place for place, layer in enumerate(layers) if layer in text[name]]
    if text["candidate_source_layer_id"] in layers:
        own["candidate_source_layer_id"] = layers.index(text["candidate_source_layer_id"])
    stated = ("engram_num_embeddings", "engram_compressed_vocab_size")
    return synthetic.tiny_v41_config(**{name: value for name, value in text.items() if name not in stated} | own)


def make(folder: Path, raw: Raw, tokens: np.ndarray) -> None:
    """The checkpoint; V4 has no stage. A table of n-grams is a hole in its file, with the rows of the prompt."""
    with patch.object(synthetic, "write_safetensors", _write_without_tables):
        synthetic.write_checkpoint(folder, raw, mtp="text_config" in raw)
    with open_checkpoint(folder) as checkpoint:
        config = checkpoint.architecture()
        if not isinstance(config, V41Config) or config.engram is None:
            return
        engram, mapped = config.engram, token_map(folder, config)
        for index, layer in enumerate(engram.layer_ids):
            before = ((0, 0), (engram.max_ngram_size - 1, 0))
            history = mapped[np.pad(tokens, before, constant_values=engram.pad_token_id)]
            rows = np.unique(np.asarray(ngram_rows(history, ngram_hash(engram, index))))
            rng = np.random.default_rng(layer)
            # Exponent fields below 9, as the generator has them, and either sign; scales of a quarter to one.
            codes = rng.integers(0, 0x48, 1 << 16) | rng.choice((0, 0x80), 1 << 16)
            _fill(checkpoint.tensors[f"layers.{layer}.engram.embed.weight"], rows, codes)
            _fill(checkpoint.tensors[f"layers.{layer}.engram.embed.scale"], rows, rng.integers(125, 128, 1 << 16))


def _write_without_tables(file: Path, entries: Iterable[TensorEntry]) -> None:
    entries = list(entries)
    content = {entry.name: _blocks(entry) for entry in entries if ".engram.embed." not in entry.name}
    write_shard(file, {entry.name: (entry.dtype, tuple(entry.shape)) for entry in entries}, content)


def _blocks(entry: TensorEntry) -> Iterator[bytes]:
    made: Any = entry.chunks() if callable(entry.chunks) else entry.chunks
    yield from (made,) if isinstance(made, bytes) else made


def _fill(tensor: Any, rows: np.ndarray, values: np.ndarray) -> None:
    """Write some rows of a table of bytes; ``values`` are taken in turn."""
    width = tensor.shape[1]
    descriptor = os.open(tensor.file, os.O_WRONLY)
    try:
        for number, row in enumerate(rows.tolist()):
            content = np.take(values, np.arange(number * width, (number + 1) * width), mode="wrap")
            os.pwrite(descriptor, content.astype(np.uint8).tobytes(), tensor.start + row * width)
    finally:
        os.close(descriptor)


def steps(work: Path, model: Model, *, program: str, reference: tuple[object, ...]) -> Iterator[dict[str, object]]:
    """Run every step; a layer's conversion is deleted before the next, so that one at a time is on the disk."""
    hf, golden, compact = work / "hf", work / "golden", work / "compact"
    layers = ("--layers", ",".join(map(str, model.layers)))
    record = ("golden", "record", hf, "--out", golden, "--tokens", work / "prompt.npy", *layers)
    yield dsv4(*record, *reference)
    yield dsv4("golden", "compact", golden, "--out", compact)
    for layer in model.layers:
        orbax = work / f"orbax-{layer}"
        compression = ("--compression", "zstd") if model.has_table else ()
        yield dsv4("convert", "hf-to-orbax", hf, orbax, "--layers", layer, "--dtype", "source", *compression)
        yield dsv4("parity", orbax, "--golden", golden, "--layer", layer, "--program", program)
        shutil.rmtree(orbax)
        yield dsv4("parity", "--source", hf, "--golden", golden, "--layer", layer, "--program", program)
    yield dsv4("parity", "--source", hf, "--golden", golden, "--mode", "both", "--program", program)
    yield dsv4("parity", "--source", hf, "--golden", compact, "--program", program)


def main() -> None:
    """Run every step, print the table, write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models, by name; all if none is given")
    parser.add_argument("--work", type=Path, default=Path("real-width"), help="folder for everything that is made")
    parser.add_argument("--config", type=Path, default=Path("tests/data/configs/DeepSeek-V4-Flash.json"))
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--experts", type=int, help="routed experts, for a small disk; default: those of the config")
    parser.add_argument("--noise", default="float32,bfloat16", help="dtypes whose noise floor is recorded")
    parser.add_argument("--program", default="streamed", help="the program that parity runs: streamed, model or both")
    parser.add_argument("--release-code", type=Path, help="V4.1: your copy of the inference folder")
    parser.add_argument("--keep", action="store_true", help="leave the folder in place")
    options = parser.parse_args()
    reference: tuple[object, ...] = ("--noise", options.noise)
    if options.release_code is not None:
        reference += ("--reference", "release", "--release-code", options.release_code, "--numerics", "plain")
    for model in models(options.config, options.experts):
        if options.names and model.name not in options.names:
            continue
        work: Path = options.work
        work.mkdir(parents=True, exist_ok=False)
        vocabulary = model.config.get("text_config", model.config)["vocab_size"]
        prompt = np.random.default_rng(0).integers(0, vocabulary, (1, options.tokens)).astype(np.int32)
        np.save(work / "prompt.npy", prompt)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # JAX has threads, and each step forks
            pool.submit(make, work / "hf", model.config, prompt).result()
        done = []
        for step in steps(work, model, program=options.program, reference=reference):
            print(json.dumps(step), flush=True)
            done.append(step)
        sizes = {name: gigabytes(work / name) for name in ("hf", "golden", "compact")}
        table = Table(title=f"{options.config.stem}, {model.name}, {options.tokens} tokens; GB: {sizes}", box=None)
        for column in ("command", "seconds", "cpu_seconds", "peak_gib", "exit_code"):
            table.add_column(column)
        for step in done:
            table.add_row(*map(str, step.values()))
        Console().print(table)
        if not options.keep:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
