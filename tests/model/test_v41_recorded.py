"""DeepSeek-V4.1's model against activations that NeMo Automodel 0.7.0 computed from the same checkpoints.

``python -m tests.witnesses.automodel_v41`` recorded them. Every fault that is planted here must show in them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from dsv4_convert.golden.synthetic import write_checkpoint
from dsv4_convert.model import Taps
from dsv4_convert.model.v41 import attention, block, compressor, engram, indexer
from dsv4_convert.model.v41 import model as backbone
from dsv4_convert.weights.published import PublishedWeights
from dsv4_convert.weights.restore import restore_model

from ..activations import differing
from ..edits import edited

DATA = Path(__file__).parents[1] / "data" / "v41" / "automodel.safetensors"
#: Largest relative error of a tap, root mean square over root mean square. Measured: 1e-7 to 1e-6.
LIMIT = 5e-6
#: The architecture that faults are planted in.
EVERY_KIND = "every kind of layer"


class Recorded:
    """One architecture: its weights, its tokens, and what Automodel computed."""

    def __init__(self, folder: Path, name: str) -> None:
        with safe_open(DATA, "np") as file:
            raw = json.loads(file.metadata()[name])
            own = [key for key in file.keys() if key.startswith(f"{name}/")]  # noqa: SIM118
            self.taps = {key.split("/", 1)[1]: file.get_tensor(key) for key in own}
        self.tokens = self.taps.pop("tokens")
        write_checkpoint(folder / "hf", raw, seed=0)
        self.weights = PublishedWeights.open(folder / "hf")

    def compute(self, depth: int | None = None) -> dict[str, np.ndarray]:
        """The same taps by dsv4's model, in the order of execution; ``depth``: of so many layers only."""
        model = restore_model(self.weights)
        if depth is not None:
            model.layers = nnx.List(list(model.layers)[:depth])
        graph, state = nnx.split(model)
        order: list[str] = []

        def run(state: Any, tokens: Any) -> dict[str, Any]:
            taps = Taps(lambda name: name in self.taps and (depth is None or name != "logits"))
            nnx.merge(graph, state)(tokens, taps=taps)
            order.extend(taps.values)
            return taps.values

        found = jax.jit(run)(state, self.tokens)
        return {key: np.asarray(found[key]) for key in order}


@pytest.mark.parametrize("name", [EVERY_KIND, "architecture 0", "architecture 9"])
def test_every_recorded_tap_is_that_of_automodel(name: str, tmp_path: Path) -> None:
    recorded = Recorded(tmp_path, name)
    found = recorded.compute()
    assert found.keys() == recorded.taps.keys()
    assert differing(found, recorded.taps, LIMIT) == []


class Edit(NamedTuple):
    """``old`` becomes ``new`` in the source of ``owner.function``; ``tap`` is the first recorded one to differ."""

    tap: str
    owner: Any
    function: str
    old: str
    new: str

    def planted(self) -> Any:
        """A context in which the model has the fault."""
        return patch.object(self.owner, self.function, edited(self.owner, self.function, self.old, self.new))


_IDS, _AFTER_ENGRAM = "layers.1.engram.ids", "layers.1.hc_attn.pre"
_KEYS, _CHOICE, _CANDIDATES = "attn.indexer.k_norm", "attn.indexer.chosen", "layers.4.attn.indexer.candidates"
FAULTS: dict[str, Edit] = {
    "the same primes for n-grams of every size": Edit(
        *(_IDS, engram, "ngram_hash", "engram.vocab_size), first, first + engram.columns))"),
        "engram.vocab_size), engram.n_heads)) * (engram.max_ngram_size - 1)",
    ),
    "the other engram's hash": Edit(_IDS, engram, "ngram_hash", "engram.tables[index]", "1 - engram.tables[index]"),
    "multipliers by the engram's number": Edit(
        _IDS, engram, "ngram_hash", "engram.published_layer_ids[table]", "table"
    ),
    "multipliers not odd": Edit(_IDS, engram, "ngram_hash", "2 * int(number) + 1", "2 * int(number)"),
    "ids joined without multipliers": Edit(_IDS, engram, "ngram_rows", "ngrams.multipliers[distance])", "1)"),
    "products added instead of joined by exclusive or": Edit(_IDS, engram, "ngram_rows", "one ^ limb", "one + limb"),
    "n-grams of the tokens that follow": Edit(
        _IDS, engram, "ngram_rows", "first = look_back - distance", "first = distance - 1"
    ),
    "offsets of the parts forgotten": Edit(_IDS, engram, "ngram_rows", "primes) + offsets", "primes)"),
    "look-back past the start finds the first token": Edit(
        *(_IDS, engram.Engram, "wanted_rows", "jnp.where(history < 0, self.pad, history)"),
        "jnp.where(history < 0, token_ids[:, :1], history)",
    ),
    "token ids not mapped": Edit(
        *(_IDS, engram.Engram, "wanted_rows", "self.token_map[...][jnp.where(history < 0, self.pad, history)]"),
        "jnp.where(history < 0, self.pad, history)",
    ),
    "the pad id not mapped": Edit(
        *(_IDS, engram.Engram, "wanted_rows", "self.token_map[...][jnp.where(history < 0, self.pad, history)]"),
        "jnp.where(history < 0, self.pad, self.token_map[...][history])",
    ),
    "gate without the square root": Edit(
        *(_AFTER_ENGRAM, engram.Engram, "_gate", "jnp.sqrt(jnp.maximum(jnp.abs(match), _LEAST))"), "jnp.abs(match)"
    ),
    "gate without the sign": Edit(_AFTER_ENGRAM, engram.Engram, "_gate", "jnp.copysign(", "jnp.maximum("),
    "engram's norm over all streams": Edit(
        *(_AFTER_ENGRAM, engram.Engram, "_gate", "rms_scale(h, self.eps)"),
        "rms_scale(h.reshape(*h.shape[:2], -1), self.eps)[..., None]",
    ),
    "engram's eps 1e-6": Edit(_AFTER_ENGRAM, engram.Engram, "__init__", "config.rms_norm_eps", "1e-6"),
    "value added without its gate": Edit(
        _AFTER_ENGRAM, engram.Engram, "__call__", "gate[..., None] * value", "jnp.ones_like(gate)[..., None] * value"
    ),
    "pre of the same half in the attention": Edit(
        *("layers.1.attn.wo_b", block.V41Block, "attend", "self._attention_input(streams, pre, taps)"),
        "self._attention_input(streams, mixing.pre, taps)",
    ),
    "pre of the same half in the experts": Edit(
        *("layers.1.hc_attn.pre", block.V41Block, "route", "self._expert_input(carry.streams, carry.pre, taps)"),
        "self._expert_input(carry.streams, mixing.pre, taps)",
    ),
    "the first half takes the mean of the streams": Edit(
        "layers.1.attn.wo_b", block.V41Block, "combine", "routed.mixing.pre", "0 * routed.mixing.pre + 0.25"
    ),
    "the attention's pre handed on by the experts": Edit(
        "layers.1.attn.wo_b", block.V41Block, "combine", "routed.mixing.pre", "carry.pre"
    ),
    "the mean of the streams before the head": Edit(
        "logits", backbone.V41Model, "collapse", "carry.pre,", "0 * carry.pre + 0.25,"
    ),
    "pairs shifted by a token": Edit(
        *("layers.2.attn.compressor.norm", compressor.LatentCompressor, "_pool", "rows.astype(jnp.float32)"),
        "jnp.roll(rows.astype(jnp.float32), 1, axis=1)",
    ),
    "softmax over channels": Edit(
        *("layers.2.attn.compressor.norm", compressor.LatentCompressor, "_pool", "axis=2), axis=2)"),
        "axis=3), axis=2)",
    ),
    "the compressor's eps 1e-6": Edit(
        "layers.2.attn.compressor.norm", compressor.LatentCompressor, "__init__", "config.rms_norm_eps", "1e-6"
    ),
    "entries at the position of the next token": Edit(
        *(f"layers.2.{_CHOICE}", compressor.LatentCompressor, "__call__", "before[:, None] + block * ratio"),
        "before[:, None] + block * ratio + 1",
    ),
    "index keys from the rotated latent": Edit(
        *(f"layers.2.{_KEYS}", attention.SharedAttention, "_compress", "self.indexer.keys(latents.values,"),
        "self.indexer.keys(rotate(latents.values, latents.start, table),",
    ),
    "index keys rotated before their norm": Edit(
        *(f"layers.2.{_KEYS}", indexer.SharedIndexer, "keys", 'taps("wk", linear(latents, self.wk[...]))'),
        "rotate(linear(latents, self.wk[...]), start, table)",
    ),
    "index keys not rotated": Edit(
        *(f"layers.2.{_CHOICE}", indexer.SharedIndexer, "keys", 'rotate(taps("k_norm", normed), start, table)'),
        'taps("k_norm", normed)',
    ),
    "the newest block not forced": Edit(
        *(_CANDIDATES, indexer.SharedIndexer, "_nominate"),
        *("jnp.where(jnp.arange(best.shape[2]) == newest, jnp.inf, best)", "best"),
    ),
    "the block of the next entry forced": Edit(
        _CANDIDATES, indexer.SharedIndexer, "_nominate", "(complete[..., None] - 1)", "complete[..., None]"
    ),
    "blocks by the mean of their scores": Edit(
        *(_CANDIDATES, indexer, "block_scores", "jnp.max(padded.reshape(*scores.shape[:2], -1, size), axis=3)"),
        "jnp.mean(jnp.maximum(padded.reshape(*scores.shape[:2], -1, size), -99), axis=3)",
    ),
    "candidates ignored": Edit(
        f"layers.6.{_CHOICE}", indexer.SharedIndexer, "_choose", "if inside is not None:", "if False:"
    ),
    "the candidate source chooses among its candidates": Edit(
        *(f"layers.4.{_CHOICE}", indexer.SharedIndexer, "_choose", "if inside is not None:"),
        "inside = inside if nominated is None else nominated\n    if inside is not None:",
    ),
    "the window-only layers' rotary table": Edit(
        f"layers.2.{_CHOICE}", attention.SharedAttention, "__call__", "compressed=self.ratio > 0", "compressed=False"
    ),
    "queries see the block that is not complete": Edit(
        *(f"layers.2.{_CHOICE}", attention.SharedAttention, "__call__", "complete_blocks(before + jnp"),
        "complete_blocks(before + 1 + jnp",
    ),
    "an earlier layer's choice, though there is a newer one": Edit(
        *("layers.6.attn.wo_b", attention.SharedAttention, "__call__", "shared._replace(chosen=chosen,"),
        "shared._replace(chosen=chosen if shared.chosen is None else shared.chosen,",
    ),
}


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(tmp_path_factory.mktemp("every_kind"), EVERY_KIND)


@pytest.mark.thorough
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_shows_at_its_tap(every_kind: Recorded, name: str) -> None:
    fault = FAULTS[name]
    depth = None if fault.tap == "logits" else int(fault.tap.split(".")[1]) + 1
    with fault.planted():
        assert differing(every_kind.compute(depth), every_kind.taps, LIMIT)[:1] == [fault.tap]
