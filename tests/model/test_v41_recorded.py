"""DeepSeek-V4.1's model against activations that NeMo Automodel 0.7.0 computed from the same checkpoints.

``python -m tests.witnesses.automodel_v41`` recorded them. Every fault that is planted here must show in them.
"""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
from pathlib import Path
from typing import Any
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
from dsv4_convert.spec.tap import Values
from dsv4_convert.spec.taps import TapKey
from dsv4_convert.spec.v41 import ngrams
from dsv4_convert.weights.published import PublishedWeights
from dsv4_convert.weights.restore import restore_model

DATA = Path(__file__).parents[1] / "data" / "v41" / "automodel.safetensors"
#: Largest relative error of a tap, root mean square over root mean square. Measured: 1e-7 to 3e-6.
LIMIT = 2e-5
#: The architecture that faults are planted in.
EVERY_KIND = "every kind of layer"


class Recorded:
    """One architecture: its weights, its tokens, and what Automodel computed."""

    def __init__(self, folder: Path, name: str) -> None:
        with safe_open(DATA, "np") as file:
            raw = json.loads(file.metadata()[name])
            own = [key for key in file.keys() if key.startswith(f"{name}/")]
            self.taps = {key.split("/", 1)[1]: file.get_tensor(key) for key in own}
        self.tokens = self.taps.pop("tokens")
        write_checkpoint(folder / "hf", raw, seed=0)
        self.weights = PublishedWeights.open(folder / "hf")

    def compute(self, *, eager: bool = False) -> dict[str, np.ndarray]:
        """The same taps by dsv4's model."""
        graph, state = nnx.split(restore_model(self.weights))

        def run(state: Any, tokens: Any) -> dict[str, Any]:
            taps = Taps(lambda name: name in self.taps)
            nnx.merge(graph, state)(tokens, taps=taps)
            self.order = list(taps.values)
            return taps.values

        found = run(state, self.tokens) if eager else jax.jit(run)(state, self.tokens)
        return {key: np.asarray(found[key]) for key in self.order}

    def differing(self, found: dict[str, np.ndarray]) -> list[str]:
        """The taps that are not Automodel's, in the order of execution."""
        assert found.keys() == self.taps.keys()
        return [name for name, value in found.items() if not _same(name, value, self.taps[name])]


def _same(name: str, found: np.ndarray, expected: np.ndarray) -> bool:
    assert found.shape == expected.shape, name
    if TapKey.parse(name).tap.values is Values.CHOICE:
        return np.array_equal(found, expected)
    error = found.astype(np.float64) - expected
    return float(np.sqrt(np.mean(error**2))) <= LIMIT * float(np.sqrt(np.mean(expected.astype(np.float64) ** 2)))


@pytest.mark.parametrize("name", [EVERY_KIND, "architecture 0", "architecture 9"])
def test_every_recorded_tap_is_that_of_automodel(name: str, tmp_path: Path) -> None:
    recorded = Recorded(tmp_path, name)
    assert recorded.differing(recorded.compute()) == []


class Edit:
    """``old`` becomes ``new`` in the source of ``owner.function``; ``tap`` is the first recorded one to differ."""

    def __init__(self, tap: str, owner: Any, function: str, old: str, new: str) -> None:
        self.tap, self.owner, self.function, self.old, self.new = tap, owner, function, old, new

    def planted(self) -> Any:
        """A context in which the model has the fault."""
        original = inspect.getattr_static(self.owner, self.function)
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(original)))
        assert source.count(self.old) == 1, f"{self.old!r} occurs {source.count(self.old)} times"
        scope = dict(vars(sys.modules[inspect.unwrap(original).__module__]))
        exec(compile(source.replace(self.old, self.new), "", "exec", dont_inherit=True), scope)
        return patch.object(self.owner, self.function, scope[self.function])


#: The first layer with an engram of the architecture, the candidate source and so on are found by these names.
_E = engram.Engram
FAULTS: dict[str, Edit] = {
    "primes of every n-gram size searched once": Edit(
        "engram.ids", ngrams, "ngram_hash", "if number not in taken and", "if number not in sized and"
    ),
    "multipliers of the layer's place among the engrams": Edit(
        "engram.ids", ngrams, "ngram_hash", "engram.published_layer_ids[table]", "table"
    ),
    "multipliers not odd": Edit("engram.ids", ngrams, "ngram_hash", "2 * int(number) + 1", "2 * int(number)"),
    "ids joined without multipliers": Edit(
        "engram.ids", engram, "ngram_rows", "ngrams.multipliers[distance])", "1)"
    ),
    "products added, not joined by exclusive or": Edit("engram.ids", engram, "ngram_rows", "one ^ limb", "one + limb"),
    "n-grams of the tokens that follow": Edit(
        "engram.ids", engram, "ngram_rows", "first = look_back - distance", "first = distance"
    ),
    "offsets of the parts forgotten": Edit("engram.ids", engram, "ngram_rows", "primes) + offsets", "primes)"),
    "look-back past the start finds the first token": Edit(
        "engram.ids", _E, "__call__", "jnp.where(history < 0, self.pad, history)",
        "jnp.where(history < 0, token_ids[:, :1], history)",
    ),
    "token ids not mapped": Edit(
        "engram.ids", _E, "__call__", "self.token_map[...][jnp.where(history < 0, self.pad, history)]",
        "jnp.where(history < 0, self.pad, history)",
    ),
    "gate without the square root": Edit("hc_attn.pre", _E, "_gate", "jnp.sqrt(jnp.maximum(jnp.abs(match), _LEAST))", "jnp.abs(match)"),
    "gate without the sign": Edit("hc_attn.pre", _E, "_gate", "jnp.copysign(", "jnp.maximum("),
    "engram's norm over all streams": Edit(
        "hc_attn.pre", _E, "_gate", "rms_scale(h, self.eps)",
        "rms_scale(h.reshape(*h.shape[:2], -1), self.eps)[..., None]",
    ),
    "value added without the gate": Edit("hc_attn.pre", _E, "__call__", "gate[..., None] * value", "value"),
    "pre of the same half in the attention": Edit(
        "attn.wo_b", block.V41Block, "attend", "self._attention_input(streams, pre, taps)",
        "self._attention_input(streams, mixing.pre, taps)",
    ),
    "pre of the same half in the experts": Edit(
        "hc_attn.pre", block.V41Block, "route", "self._expert_input(carry.streams, carry.pre, taps)",
        "self._expert_input(carry.streams, mixing.pre, taps)",
    ),
    "the first half takes the mean of the streams": Edit(
        "attn.wo_b", backbone.V41Model, "enter", "jnp.float32).at[..., 0].set(1)", "jnp.float32) + 0.25"
    ),
    "pre of the attention before the head": Edit(
        "logits", block.V41Block, "combine", "routed.mixing.pre", "carry.pre"
    ),
    "ratio-2 pair shifted": Edit(
        "attn.compressor.norm", compressor.LatentCompressor, "_pool", "rows.astype(jnp.float32)",
        "jnp.roll(rows.astype(jnp.float32), 1, axis=1)",
    ),
    "softmax over channels": Edit(
        "attn.compressor.norm", compressor.LatentCompressor, "_pool", "axis=2), axis=2)", "axis=3), axis=2)"
    ),
    "entries rotated to the next token": Edit(
        "attn.wo_b", compressor.LatentCompressor, "__call__", "before[:, None] + block * ratio",
        "before[:, None] + block * ratio + 1",
    ),
    "index keys from the rotated latent": Edit(
        "attn.indexer.k_norm", attention.SharedAttention, "_compress", "self.indexer.keys(latents.values,",
        "self.indexer.keys(rotate(latents.values, latents.start, table),",
    ),
    "index keys not normed": Edit(
        "attn.indexer.k_norm", indexer.SharedIndexer, "keys",
        'rms_norm(taps("wk", linear(latents, self.wk[...])), self.k_norm[...], self.eps)',
        'taps("wk", linear(latents, self.wk[...])) * self.k_norm[...]',
    ),
    "index keys not rotated": Edit(
        "attn.indexer.chosen", indexer.SharedIndexer, "keys", 'rotate(taps("k_norm", normed), start, table)',
        'taps("k_norm", normed)',
    ),
    "newest block not forced": Edit(
        "attn.indexer.candidates", indexer.SharedIndexer, "_nominate",
        "jnp.where(jnp.arange(best.shape[2]) == newest, jnp.inf, best)", "best",
    ),
    "newest block that of the next entry": Edit(
        "attn.indexer.candidates", indexer.SharedIndexer, "_nominate", "(complete[..., None] - 1)",
        "(complete[..., None])",
    ),
    "blocks by their mean": Edit(
        "attn.indexer.candidates", indexer, "block_scores",
        "jnp.max(padded.reshape(*scores.shape[:2], -1, size), axis=3)",
        "jnp.mean(jnp.maximum(padded.reshape(*scores.shape[:2], -1, size), -99), axis=3)",
    ),
    "candidates ignored": Edit(
        "attn.indexer.chosen", indexer.SharedIndexer, "_choose", "if inside is not None:", "if False:"
    ),
    "the candidate source limits itself": Edit(
        "attn.indexer.chosen", indexer.SharedIndexer, "_choose", "if inside is not None:\n",
        "inside = nominated if nominated is not None else inside\n    if inside is not None:\n",
    ),
    "entries of the window-only layers' rotary table": Edit(
        "attn.wo_b", attention.SharedAttention, "__call__", "compressed=self.ratio > 0", "compressed=False"
    ),
    "queries may see the open block": Edit(
        "attn.indexer.chosen", attention.SharedAttention, "__call__", "complete_blocks(before +",
        "complete_blocks(before + 1 +",
    ),
    "the choice of the layer before the last indexer": Edit(
        "attn.wo_b", attention.SharedAttention, "__call__", "shared._replace(chosen=chosen, candidates=candidates)",
        "shared._replace(chosen=chosen if shared.chosen is None else shared.chosen, candidates=candidates)",
    ),
}


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(tmp_path_factory.mktemp("every_kind"), EVERY_KIND)


@pytest.mark.thorough
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_shows_at_its_tap(every_kind: Recorded, name: str) -> None:
    with FAULTS[name].planted():
        differing = every_kind.differing(every_kind.compute())
    assert differing
    layer = differing[0].split(".")[1] if differing[0] != "logits" else None
    first = differing[0] if layer is None else differing[0].split(".", 2)[2]
    assert first == FAULTS[name].tap
