"""A model that computes from the published codes, against the same one with its weights expanded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from typer.testing import CliRunner

from dsv4_convert.cli import app
from dsv4_convert.convert import Storage, hf_to_orbax
from dsv4_convert.converted import Weights
from dsv4_convert.errors import ResourceError, UsageError
from dsv4_convert.golden.synthetic import Form, tiny_config, write_checkpoint
from dsv4_convert.model import Cache, Model
from dsv4_convert.model.encoded import Encoded
from dsv4_convert.model.layers import ScannedLayers
from dsv4_convert.model.segments import segments
from dsv4_convert.restore import restore_model

#: Blocks of scales are cut off, and cross from one output group into the next; two layers share a program.
CHANGES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "compress_ratios": [4, 0, 0, 0],
    "num_hash_layers": 1,
    "hidden_size": 160,
    "o_lora_rank": 80,
    "q_lora_rank": 136,
    "n_routed_experts": 12,
}
IDS = np.random.default_rng(0).integers(2, 96, (2, 21)).astype(np.int32)
FORMS: tuple[Form, ...] = ("fp4", "fp8")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[Form, Path]:
    """Checkpoints in the published bytes: as Flash, and as the Base releases."""
    return {form: _converted(tmp_path_factory.mktemp(form), form, CHANGES) for form in FORMS}


def _converted(work: Path, form: Form, changes: dict[str, Any], storage: Storage = Storage.SOURCE) -> Path:
    write_checkpoint(work / "hf", tiny_config(**changes), seed=0, form=form)
    hf_to_orbax(work / "hf", work / "orbax", storage=storage)
    return work / "orbax"


def _near(found: jax.Array, expected: jax.Array) -> None:
    """The same sums; where many rows go through an expert their order is another, as expanded ones may go at once."""
    assert float(jnp.std(expected)) > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * float(jnp.abs(expected).max()))


def _logits(model: Model, dtype: Any = jnp.float32, *, then: bool) -> list[jax.Array]:
    """Of a prompt, and ``then`` of a token after it."""
    graph, state = nnx.split(model)

    def extend(state: Any, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        return nnx.merge(graph, state).extend(ids, cache)

    extend = jax.jit(extend)
    cache = Cache.empty(model.config, len(IDS), IDS.shape[1], dtype=dtype, numerics=model.numerics)
    prompt, cache = extend(state, jnp.asarray(IDS[:, :-1]), cache)
    return [prompt, extend(state, jnp.asarray(IDS[:, -1:]), cache)[0]] if then else [prompt]


@pytest.mark.parametrize("form", ["fp4", pytest.param("fp8", marks=pytest.mark.thorough)])
def test_weights_and_logits_are_those_of_expanded_weights(converted: dict[Form, Path], form: Form) -> None:
    """A prompt; and a token after it, for which most experts have nothing to do."""
    weights = Weights.open(converted[form])
    expanded, encoded = (restore_model(weights, drafts=True, encoded=encoded) for encoded in (False, True))
    pairs = list(zip(*(nnx.to_flat_state(nnx.state(model)) for model in (expanded, encoded)), strict=True))
    kinds = 0
    for (key, plain), (_, coded) in pairs:
        np.testing.assert_array_equal(coded[...], plain[...], err_msg=str(key))
        kinds += isinstance(coded.get_value(), Encoded)
    assert kinds == 3 * 11 + 1 + 13  # eleven in a layer, one in an indexer, two more in a stage
    sizes = [sum(part.nbytes for part in jax.tree.leaves(nnx.state(model))) for model in (expanded, encoded)]
    assert sizes[1] < sizes[0] / 2.5
    for found, expected in zip(*(_logits(model, then=form == "fp4") for model in (encoded, expanded)), strict=True):
        _near(found, expected)


@pytest.mark.thorough
def test_scanned_layers(converted: dict[Form, Path]) -> None:
    """The layers' codes, stacked."""
    listed = restore_model(Weights.open(converted["fp4"]), encoded=True)
    scanned = nnx.eval_shape(lambda: ScannedLayers(listed.config, listed.numerics))
    graph, state = nnx.split(scanned)
    flat = {}
    for key, variable in nnx.to_flat_state(state):
        _, segment, place, *rest = key
        layers = segments(listed.config)[segment].layers(place)
        own = [_at(listed.layers[layer], rest).get_value() for layer in layers]
        flat[key] = variable.replace(jax.tree.map(lambda *parts: jnp.stack(parts), *own))
    model = nnx.merge(*nnx.split(listed))
    expected = jax.jit(lambda ids: listed(ids))(IDS)
    model.layers = nnx.merge(graph, nnx.from_flat_state(flat))
    assert any(len(segments(listed.config)[segment].layers(0)) > 1 for segment in range(2))
    _near(jax.jit(lambda ids: model(ids))(IDS), expected)


def _at(module: Any, path: list[Any]) -> Any:
    for name in path:
        module = getattr(module, name)
    return module


def test_release_numerics_take_the_codes_numbers_unrounded(tmp_path: Path) -> None:
    """Float32 scales, whose products bfloat16 does not hold."""
    widths = dict.fromkeys(("hidden_size", "moe_intermediate_size", "q_lora_rank"), 128)
    changes = {
        "num_hidden_layers": 1,
        "compress_ratios": [4, 0],
        "head_dim": 72,
        "o_lora_rank": 64,
        "index_head_dim": 32,
    }
    weights = Weights.open(_converted(tmp_path, "fp8", {**widths, **changes}))
    options: dict[str, Any] = {"dtype": np.dtype(jnp.bfloat16), "release": True}
    expanded, encoded = (restore_model(weights, **options, encoded=encoded) for encoded in (False, True))
    assert encoded.layers[0].attn.wq_a.get_value().dtype == np.float32
    _near(*(_logits(model, jnp.bfloat16, then=False)[0] for model in (encoded, expanded)))


def test_the_command(converted: dict[Form, Path]) -> None:
    arguments = ["generate", str(converted["fp4"]), "--tokens", "5,6,7;8", "-n", "4", "--json", "-", "--weights"]
    outcomes = []
    for held in ("expanded", "source"):
        done = CliRunner().invoke(app, [*arguments, held])
        assert done.exit_code == 0, done.output
        outcomes.append(json.loads(done.stdout))
    assert [outcome["weights"] for outcome in outcomes] == ["expanded", "source"]
    assert outcomes[0]["tokens"] == outcomes[1]["tokens"]
    assert len(set(outcomes[0]["tokens"][0])) > 2
    assert CliRunner().invoke(app, [*arguments, "packed"]).exit_code == 2


def test_what_cannot_stay_encoded_is_said(tmp_path: Path) -> None:
    weights = Weights.open(_converted(tmp_path, "fp4", {}, Storage.BFLOAT16))
    with pytest.raises(UsageError, match=r"expanded to bfloat16; .* convert the source again with --dtype source"):
        restore_model(weights, encoded=True)


def test_the_memory_that_is_asked_for_is_that_of_the_codes(
    converted: dict[Form, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Weights.open(converted["fp4"])
    model = restore_model(weights, encoded=True)
    held = sum(part.nbytes for part in jax.tree.leaves(nnx.state(model)))
    real = Path.read_text

    def available(kilobytes: int) -> None:
        text = f"MemAvailable: {kilobytes} kB\n"
        monkeypatch.setattr(
            Path, "read_text", lambda path, *a, **k: text if str(path) == "/proc/meminfo" else real(path, *a, **k)
        )

    available(-(-held // 1024))
    restore_model(weights, encoded=True)
    with pytest.raises(ResourceError, match="in float32"):
        restore_model(weights)
    available(held * 99 // 100 // 1024)
    with pytest.raises(ResourceError, match="in their published form"):
        restore_model(weights, encoded=True)
