"""V4.1's draft stages against NeMo Automodel's, tap by tap: as recorded in ``tests/data/v41``.

``python -m tests.witnesses.automodel_v41_drafts`` recorded them. Every fault that is planted here must show in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dsv4_convert.golden.synthetic import write_checkpoint
from dsv4_convert.model import Taps, dspark
from dsv4_convert.model.cache import Past, empty_stages
from dsv4_convert.model.model import Decoder
from dsv4_convert.model.v41 import attention, block
from dsv4_convert.spec.taps import TapKey, taps_of
from dsv4_convert.weights.published import PublishedWeights
from dsv4_convert.weights.restore import restore_model

from ..activations import differing
from ..edits import edited
from ..parity.faults.fault import uncompiled
from .drafting_v41 import BATCH, CONFIG, LENGTHS, RECORDED, SEED, inputs

#: Largest relative error of a tap, root mean square over root mean square.
LIMIT = 5e-6
#: Taps that no module of Automodel ends with; its confidence head reads other streams than the release's.
OUT_OF_REACH = {
    *("targets", "main", "streams", "pre", "context", "input", "input.pre", "attn.q_rope", "attn.kv_rope"),
    *("attn.main.kv_rope", "attn.context", "attn.context_unrotated", "hc_attn.collapsed", "hc_attn.streams"),
    *("hc_ffn.collapsed", "hc_head.collapsed", "ffn.gate.logits", "ffn.gate.scores", "ffn.gate.experts"),
    *("ffn.gate.weights", "ffn.experts", "ffn.shared_experts", "confidence"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """The whole model in float32, with its stages."""
    folder = tmp_path_factory.mktemp("dspark_v41") / "hf"
    write_checkpoint(folder, CONFIG, seed=SEED)
    return restore_model(PublishedWeights.open(folder), drafts=True)


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """Programs would take longer to compile than the stages run."""
    with uncompiled():
        yield


def drafted(model: Decoder, tokens: int, *, parts: int = 1) -> dict[str, np.ndarray]:
    """The taps of a draft behind so many tokens, in the order of execution; ``parts``: calls that bring them."""
    config, (streams, following) = model.config, inputs(tokens)
    states, seen = empty_stages(config, BATCH, jnp.float32), 0
    for part in np.array_split(np.arange(tokens), parts):
        reading, taps = model.reading_drafts(), Taps(lambda name: True)
        for place, layer in enumerate(config.draft_sources):
            reading.within(config.prefix(layer))(config.draft_tap(layer), jnp.asarray(streams[:, part, place]))
        count, before = (jnp.full(BATCH, number, jnp.int32) for number in (len(part), seen))
        first, past = jnp.zeros(BATCH, jnp.int32), Past(states, before, count)
        _, states = model.propose(reading, jnp.asarray(following[:, part]), first, past, taps)
        seen += len(part)
    return {name: np.asarray(value) for name, value in taps.values.items()}


def recorded(tokens: int) -> dict[str, np.ndarray]:
    """Automodel's values after so many tokens."""
    prefix = f"{tokens}/"
    return {name.removeprefix(prefix): value for name, value in load_file(RECORDED).items() if name.startswith(prefix)}


@pytest.mark.parametrize("tokens", LENGTHS)
def test_every_tap_is_that_of_automodel(model: Decoder, tokens: int) -> None:
    found, config = drafted(model, tokens), model.config
    assert differing(found, recorded(tokens), LIMIT) == []
    names = {str(TapKey.of(config, layer, tap)) for layer in config.stage_layers for tap in taps_of(config, layer)}
    assert found.keys() == names
    assert recorded(tokens).keys() == {name for name in names if name.split(".", 2)[2] not in OUT_OF_REACH}


def test_a_draft_after_parts_is_one_after_all(model: Decoder) -> None:
    tokens = LENGTHS[-1]
    whole, parts = drafted(model, tokens), drafted(model, tokens, parts=3)
    for name in ("mtp.0.attn.context", "mtp.2.draft_logits", "mtp.2.confidence"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(parts["mtp.2.tokens"], whole["mtp.2.tokens"])


@pytest.mark.parametrize(
    ("tap", "owner", "function", "old", "new"),
    [
        ("mtp.0.main_proj", dspark.DSparkBlock, "context", "features.astype(jnp.float32)",
         "2 * features.astype(jnp.float32)"),
        ("mtp.0.attn.wo_a", dspark.DSparkBlock, "remember", "context, positions, ", "context, positions + 1, "),
        ("mtp.1.attn_norm", block.V41Block, "combine", "routed.mixing.pre", "carry.pre"),
        ("mtp.0.attn.wo_a", attention.SharedAttention, "__call__", "self._queries(q_low_rank, taps)",
         "2 * self._queries(q_low_rank, taps)"),
        ("mtp.0.attn.wo_a", dspark.DSparkBlock, "places", "past.count[:, None]", "past.count[:, None] + 1"),
        ("mtp.2.markov_head.embed", dspark.DSparkBlock, "choose", "logits[:, at] + head", "logits[:, at] - head"),
    ],
)  # fmt: skip
def test_a_planted_fault_shows(model: Decoder, tap: str, owner: Any, function: str, old: str, new: str) -> None:
    with patch.object(owner, function, edited(owner, function, old, new)):
        wrong = differing(drafted(model, LENGTHS[0]), recorded(LENGTHS[0]), LIMIT)
    assert wrong[0] == tap
