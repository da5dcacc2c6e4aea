"""Activations of an implementation that is not ours: what is accepted, what fails, what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from dsv4_convert.errors import UsageError
from dsv4_convert.golden.archive import Golden, open_golden
from dsv4_convert.golden.compact import Compact
from dsv4_convert.golden.shrink import shrink
from dsv4_convert.parity.activations import Expected, compare_activations
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.words import verdict
from dsv4_convert.spec.taps import TapKey

from .ties import swapped_entries, swapped_expert

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def archive(golden: Path) -> Golden:
    """The committed golden, open."""
    return open_golden(golden)


@pytest.fixture
def layer(archive: Golden) -> dict[str, Array]:
    """Everything that the golden has of layer 3, as another implementation might hand it over; free to be changed."""
    return {key.tap.name: archive.read(key).copy() for key in archive.taps(3)}


def test_the_reference_itself_agrees(archive: Golden, layer: dict[str, Array]) -> None:
    report = Expected(archive).check(layer, layer=3)
    assert report.count(Verdict.PASS) == len(layer) == 46
    assert all(tap.distance is None or tap.distance.max_abs == 0 for tap in report.taps)
    assert [tap.key for tap in report.taps] == list(archive.taps(3))  # in order of execution, whatever came first
    assert Expected(archive).check({"logits": archive.read("logits")}, mode="cumulative").passed
    assert Expected(archive).check({"layers.3.ffn": layer["ffn"]}).passed


@pytest.mark.parametrize(
    "convert", [torch.from_numpy, jnp.asarray, lambda array: array.astype(np.float64)], ids=["torch", "jax", "float64"]
)
def test_arrays_of_other_libraries(archive: Golden, layer: dict[str, Array], convert: Callable[..., Any]) -> None:
    chosen = {name: layer[name] for name in ("attn.q", "ffn")}
    assert compare_activations({name: convert(array) for name, array in chosen.items()}, archive, layer=3).passed
    wrong = {name: convert(np.roll(array, 1, 1)) for name, array in chosen.items()}
    assert not compare_activations(wrong, archive, layer=3).passed


@pytest.mark.parametrize(
    "convert",
    [
        lambda array: torch.from_numpy(array).to(torch.bfloat16).requires_grad_(),
        lambda array: jnp.asarray(array, jnp.bfloat16),
        lambda array: array.astype(ml_dtypes.bfloat16),
    ],
    ids=["torch", "jax", "numpy"],
)
def test_bfloat16_has_the_noise_floor_of_bfloat16(
    archive: Golden, layer: dict[str, Array], convert: Callable[..., Any]
) -> None:
    given = {"attn.q": convert(layer["attn.q"])}
    report = compare_activations(given, archive, layer=3)
    assert report.passed
    assert report.dtype == "bfloat16"
    assert report.taps[0].distance is not None
    assert report.taps[0].distance.max_abs > 0
    assert not compare_activations(given, archive, layer=3, dtype="float32").passed
    widened = {"attn.q": layer["attn.q"].astype(ml_dtypes.bfloat16).astype(np.float32)}
    assert Expected(archive).check(widened, layer=3, dtype="bfloat16").dtype == "bfloat16"
    assert not Expected(archive, dtype="bfloat16").report(widened, layer=3, dtype="float32").passed


def test_a_failure_says_what_parity_says(archive: Golden, layer: dict[str, Array]) -> None:
    layer["attn.q_rope"] = layer["attn.q_rope"][..., ::-1]
    layer["attn.context"] = layer["attn.context"] + 1
    with pytest.raises(AssertionError) as failed:
        Expected(archive).check(layer, layer=3)
    lines = str(failed.value).splitlines()
    assert lines[0].startswith("FAIL: layers.3.attn.q_rope is the first tap that diverges; ")
    (row,) = (line for line in lines if line.startswith("attn.q_rope "))
    assert row.endswith("fail < first")
    assert max(map(len, lines[1:])) <= 100


def test_nothing_to_compare_fails(archive: Golden) -> None:
    with pytest.raises(AssertionError, match="FAIL: nothing was compared"):
        Expected(archive).check({}, layer=3)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((1, 300, 32), r"shape \[1, 300, 32\], expected \[1, 300, 2, 16\] \(B 1, S 300, H 2, C 16\); as many elements"),
        ((1, 2, 300, 16), "; the axes are in another order"),
        ((1, 300, 2, 1), r"\(B 1, S 300, H 2, C 16\)$"),
        ((300, 2, 16), "as many elements: reshape it"),
    ],
)
def test_another_shape_is_explained(
    archive: Golden, layer: dict[str, Array], shape: tuple[int, ...], reason: str
) -> None:
    report = compare_activations({"attn.q": np.resize(layer["attn.q"], shape)}, archive, layer=3)
    assert not report.passed

    assert re.search(reason, report.taps[0].reason), report.taps[0].reason


def test_experts_may_come_in_any_order_with_their_weights(archive: Golden, layer: dict[str, Array]) -> None:
    experts, weights = "ffn.gate.experts", "ffn.gate.weights"
    turned = {name: layer[name][..., ::-1] for name in (experts, weights)}
    assert compare_activations(turned, archive, layer=3).passed
    assert not compare_activations({**turned, weights: layer[weights]}, archive, layer=3).passed
    assert compare_activations({experts: turned[experts].astype(np.int64)}, archive, layer=3).passed
    with pytest.raises(UsageError, match=r"in the order of layers\.3\.ffn\.gate\.experts, which has to be handed over"):
        compare_activations({weights: layer[weights]}, archive, layer=3)


def test_a_tie_of_the_indexer_may_change_the_experts_of_its_token_unless_a_table_chooses_them(archive: Golden) -> None:
    for number, by_table in ((3, False), (1, True)):
        layer = {key.tap.name: archive.read(key).copy() for key in archive.taps(number)}
        token = swapped_entries(layer)
        del layer["attn.indexer.scores"]  # they would say that the golden's choice is the better one
        names = list(layer)
        for name in names[names.index("attn.indexer.chosen") + 1 :]:
            if name != "ffn.gate.experts":
                layer[name][0, token] += 1
        report = compare_activations(layer, archive, layer=number, dtype="bfloat16")
        assert report.passed, report.first_diverging
        # Every other expert, which no score of the golden's excuses.
        others = np.setdiff1d(np.arange(archive.config.n_routed_experts), layer["ffn.gate.experts"][0, token])
        layer["ffn.gate.experts"][0, token] = others[: layer["ffn.gate.experts"].shape[-1]]
        report = compare_activations(layer, archive, layer=number, dtype="bfloat16")
        failing = [tap.short for tap in report.taps if tap.verdict is Verdict.FAIL]
        assert failing == (["ffn.gate.experts"] if by_table else [])
        assert [tap.short for tap in report.taps if tap.verdict is Verdict.TIE] == ["attn.indexer.chosen"]


def test_what_follows_a_tie_is_left_out_for_its_token_only(archive: Golden, layer: dict[str, Array]) -> None:
    token = swapped_expert(layer, closest=True)
    del layer["ffn.gate.scores"]  # they would say that the golden's choice is the better one
    report = compare_activations(layer, archive, layer=3, dtype="bfloat16")
    assert report.passed
    assert [tap.name for tap in report.taps if tap.verdict is Verdict.TIE] == ["layers.3.ffn.gate.experts"]
    layer["ffn.experts"][0, token - 1] += 1
    report = compare_activations(layer, archive, layer=3, dtype="bfloat16")
    assert [tap.name for tap in report.taps if tap.verdict is Verdict.FAIL] == ["layers.3.ffn.experts"]


def test_a_choice_that_is_no_tie_fails_with_all_that_follows(archive: Golden, layer: dict[str, Array]) -> None:
    swapped_expert(layer, closest=False)
    report = compare_activations(layer, archive, layer=3, dtype="bfloat16")
    assert report.first_diverging is not None
    assert report.first_diverging.name == "layers.3.ffn.gate.experts"
    assert report.count(Verdict.FAIL) == 5


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"attn.wq_c": 0}, {"layer": 3}, r"layers\.3\.attn\.wq_c: unknown tap; close ones: .*attn\.wq_a"),
        ({"attn.q": 0}, {}, r"of which layer\? Say layer=, or the full name, such as layers\.0\.attn\.q$"),
        ({"attn.indexer.scores": 0}, {}, r"of which layer\? .* such as layers\.1\.attn\.indexer\.scores$"),
        ({"attn.q": 0}, {"layer": 9}, "layer 9 was not recorded"),
        ({"attn.compressor.wkv": 0}, {"layer": 0}, "layer 0, of sliding_attention, hash routing, has no such tap"),
        ({"cache.window": 0}, {"layer": 0}, "no token came one by one"),
        ({"attn.q": "text"}, {"layer": 0}, "expected an array of numbers, found str"),
        ({"attn.q": np.zeros(3, np.float16)}, {"layer": 0}, "float16 has no noise floor"),
        ({"attn.q": torch.zeros(3, dtype=torch.float16)}, {"layer": 0}, "float16 has no noise floor"),
        ({"attn.q": torch.zeros(3, dtype=torch.float8_e4m3fn)}, {"layer": 0}, "attn.q: cannot be made a NumPy array"),
        (
            {"attn.q": torch.zeros(3, dtype=torch.bool)},
            {"layer": 0},
            "expected an array of numbers, found Tensor of bool",
        ),
        ({"attn.q": np.zeros(3), "layers.0.attn.q": np.zeros(3)}, {"layer": 0}, "given twice"),
        ({"attn.q": np.zeros(3)}, {"layer": 0, "mode": "both"}, "expected isolated or cumulative"),
        ({"attn.q": np.zeros(3)}, {"layer": 0, "dtype": "float64"}, "expected one of float32, bfloat16"),
    ],
)
def test_what_makes_no_sense_is_refused(
    archive: Golden, given: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        compare_activations(given, archive, **options)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, lambda f: jax.grad(lambda x: f(x).sum())])
def test_a_traced_array_is_refused_by_name(archive: Golden, transform: Callable[..., Any]) -> None:
    def check(x: jax.Array) -> jax.Array:
        Expected(archive).check({"attn.q": x}, layer=3)
        return x

    message = r"attn\.q: traced by JAX \(float32 \[.*\]\), so it has no numbers yet\. Return it from jit "
    with pytest.raises(UsageError, match=message):
        transform(check)(jnp.ones((1, 300, 2, 16)))


def test_a_compact_golden_is_for_runs_from_the_tokens(archive: Golden, tmp_path: Path) -> None:
    compact = Expected(shrink(archive, tmp_path / "compact", Compact.of([-1], archive.tokens.shape[1])))
    given = {str(key): archive.read(key) for key in archive.taps(3)}
    with pytest.raises(UsageError, match="mode='cumulative'"):
        compact.check(given)
    with pytest.raises(UsageError, match="does not hold the inputs of layers"):
        compact.input(3)
    assert compact.check(given, mode="cumulative").passed
    given["layers.3.attn.q"][0, 5] += 1
    with pytest.raises(AssertionError, match=r"layers\.3\.attn\.q is the first"):
        compact.check(given, mode="cumulative")


def test_what_an_implementation_is_fed_with(archive: Golden) -> None:
    expected = Expected(archive)
    assert np.array_equal(expected.input(3), archive.read("layers.2.hc_ffn.streams"))
    assert np.array_equal(expected.input(None), archive.read("layers.3.hc_ffn.streams"))
    assert expected.positions.tolist() == [list(range(300))]
    assert expected.choices(3).keys() == {"attn.indexer.chosen", "ffn.gate.experts"}
    for number in (None, *expected.layers):
        for name in expected.names(number):
            assert (
                expected.shape(name)
                == expected.shape(TapKey.parse(name).tap.name, layer=number)
                == archive.read(name).shape
            )
    assert expected.shape("attn.q") == (1, 300, 2, 16)
    assert expected.shape("attn.indexer.scores") == (1, 300, 75)
    with pytest.raises(UsageError, match=r"of which layer\? .* such as layers\.1\.attn\.compressor\.entries$"):
        expected.shape("attn.compressor.entries")  # other layers have other ones
    with pytest.raises(UsageError, match=r"close ones: attn\.q"):
        expected.shape("attn.Q")
    with pytest.raises(UsageError, match="layer 4 was not recorded"):
        expected.input(4)


def test_what_the_golden_gave_does_not_count_as_compared(archive: Golden, layer: dict[str, Array]) -> None:
    """In isolated mode the input is the golden's own: agreement with it says nothing of the implementation."""
    fed = compare_activations({"input": layer["input"]}, archive, layer=3)
    assert not fed.passed
    assert verdict(fed).startswith("FAIL: nothing was compared.")
    assert compare_activations({"input": layer["input"]}, archive, layer=3, mode="cumulative").passed
    assert not compare_activations({"input": layer["input"] + 1, "ffn": layer["ffn"]}, archive, layer=3).passed
