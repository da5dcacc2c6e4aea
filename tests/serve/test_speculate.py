"""Speculative decoding: the tokens are those of plain greedy decoding, and drafts count as often as they are right."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from typer.testing import CliRunner

from dsv4_convert.cli import app
from dsv4_convert.convert import Storage, hf_to_orbax
from dsv4_convert.convert.against import compare_with_source
from dsv4_convert.convert.to_hf import orbax_to_hf
from dsv4_convert.errors import UsageError
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.model import Cache, Model, Taps
from dsv4_convert.parity.run import ParityOptions, run_parity
from dsv4_convert.serve import speculate
from dsv4_convert.serve.generate import Generator, Sampling
from dsv4_convert.serve.speculate import Drafts
from dsv4_convert.store import open_store
from dsv4_convert.weights.converted import Weights
from dsv4_convert.weights.restore import restore_model

#: Past the window of 16 and blocks of 4 and 128 while the new tokens come; 1 leaves nothing to read before.
NEW = 24
PROMPTS = [np.random.default_rng(length).integers(2, 96, length).tolist() for length in (1, 5, 13, 118, 140)]
#: How much of its outputs an :func:`_agreeing` model's layer adds to the streams: with less the stage is right more.
SHARES = (1.0, 0.3, 0.0)
MIXED = 0.3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of BF16 weights, and what it was converted to."""
    work = tmp_path_factory.mktemp("speculate")
    write_checkpoint(work / "hf", tiny_config(), seed=0, form="bf16")
    hf_to_orbax(work / "hf", work / "orbax", storage=Storage.FLOAT32)
    return work / "hf", work / "orbax"


def _agreeing(model: Model, share: float) -> Model:
    """A model that looks at the last token most of all, and a stage that says what the model would.

    The outputs of all halves count ``share``; the stage passes the next token's embedding on to the model's own head.
    """
    for block in (*model.layers, *model.mtp):
        block.attn.wo_b[...] *= share
        block.ffn.experts.w2[...] *= share
        block.ffn.shared_experts.w2[...] *= share
    stage = model.mtp[0]
    stage.enorm[...] = jnp.ones_like(stage.enorm[...])
    stage.e_proj[...] = jnp.eye(len(stage.e_proj[...]))
    stage.h_proj[...] = jnp.zeros_like(stage.h_proj[...])
    for name in ("norm", "hc_head_fn", "hc_head_base", "hc_head_scale"):
        getattr(stage, name)[...] = getattr(model, name)[...]
    return model


@pytest.fixture(scope="module")
def model(folders: tuple[Path, Path]) -> Callable[[float | None], Model]:
    """The converted model as it is (None), or :func:`_agreeing`."""

    @cache
    def made(share: float | None) -> Model:
        restored = restore_model(Weights.open(folders[1]), drafts=True)
        return restored if share is None else _agreeing(restored, share)

    return made


@partial(jax.jit, static_argnums=0)
def _says(graph: nnx.GraphDef[Model], state: nnx.State, ids: jax.Array, count: jax.Array) -> jax.Array:
    """The stage's prediction of a whole text at once: at t, the token t + 2."""
    model = nnx.merge(graph, state)
    cache = Cache.empty(model.config, 1, ids.shape[1])
    streams, _ = model.advance(ids, cache, count=count, taps=Taps())
    positions = jnp.arange(ids.shape[1] - 1, dtype=jnp.int32)[None]
    logits, _ = model.draft(streams[:, :-1], ids[:, 1:], positions)
    return jnp.argmax(logits[0], axis=-1)


def _expected_drafts(model: Model, prompt: list[int], new: list[int]) -> Drafts:
    """How often a pass meets what the stage says of the whole text, and finds it right."""
    text = [*prompt, *new]
    padded = np.zeros((1, len(PROMPTS[-1]) + NEW), np.int32)
    padded[0, : len(text)] = text
    says = np.asarray(_says(*nnx.split(model), jnp.asarray(padded), jnp.array([len(text)], jnp.int32)))
    known, drafted, accepted = len(prompt) + 1, 0, 0
    while known < len(text):
        right = int(says[known - 2] == text[known])
        known, drafted, accepted = known + 1 + right, drafted + 1, accepted + right
    return Drafts(drafted, accepted)


@pytest.mark.parametrize("share", [None, *SHARES])
def test_tokens_are_those_of_plain_greedy_decoding(model: Callable[..., Model], share: float | None) -> None:
    """Together and alone, whatever share of the drafts is right; and that share is what the stage deserves."""
    made = model(share)
    plain, drafting = Generator(made), Generator(made, speculative=True)
    expected = plain(PROMPTS, new_tokens=NEW)
    assert drafting(PROMPTS, new_tokens=NEW) == expected
    deserved = [_expected_drafts(made, prompt, new) for prompt, new in zip(PROMPTS, expected, strict=True)]
    drafted, accepted = (sum(getattr(each, part) for each in deserved) for part in ("drafted", "accepted"))
    assert drafting.drafts == Drafts(drafted, accepted)
    if share == 0:
        assert accepted == drafted == len(PROMPTS) * (NEW // 2)
    elif share == MIXED:
        assert 0.2 < accepted / drafted < 0.95, "both ways of a pass have to be met"
        assert len({each.accepted for each in deserved}) > 1, "the prompts of a batch go at their own speeds"


def test_every_length_ends_where_it_should(model: Callable[..., Model]) -> None:
    made = model(MIXED)
    plain, drafting = Generator(made), Generator(made, speculative=True)
    seen: list[tuple[int, int]] = []
    for new_tokens in (0, 1, 2, 3, 8):
        seen.clear()
        room = len(PROMPTS[-1]) + NEW - new_tokens  # as much as in the other tests, so that their programs serve
        prompts = [*PROMPTS[:-1], (2 * PROMPTS[-1])[:room]]
        found = drafting(prompts, new_tokens=new_tokens, on_token=lambda *new: seen.append(new))
        assert found == plain(prompts, new_tokens=new_tokens)
        assert [[token for row, token in seen if row == at] for at in range(len(prompts))] == found


def test_a_stop_token_ends_its_prompt_only(model: Callable[..., Model]) -> None:
    """Also where it is the first of two tokens of a pass."""
    made = model(0.0)
    drafting = Generator(made, speculative=True)
    free = drafting(PROMPTS, new_tokens=NEW)
    for row, new in enumerate(free):
        for at in (1, 2):
            stop = new[at]
            found = drafting(PROMPTS, new_tokens=NEW, stop=[stop])
            assert found[row] == new[: new.index(stop) + 1]
            assert found == [text[: text.index(stop) + 1] if stop in text else text for text in free]


def test_two_programs_serve_every_call_of_a_shape(model: Callable[..., Model]) -> None:
    def programs() -> tuple[int, int]:
        return speculate.prefill._cache_size(), speculate.verify._cache_size()

    drafting, before = Generator(model(MIXED), speculative=True), programs()
    drafting(PROMPTS, new_tokens=NEW)
    after = programs()
    assert max(now - then for now, then in zip(after, before, strict=True)) <= 1
    for given in (PROMPTS[::-1], [prompt[::-1] for prompt in PROMPTS], [PROMPTS[-1]] + [[7]] * 4):
        drafting(given, new_tokens=NEW)
    assert programs() == after


def test_what_is_refused(folders: tuple[Path, Path], model: Callable[..., Model], tmp_path: Path) -> None:
    drafting = Generator(model(0.0), speculative=True)
    with pytest.raises(UsageError, match="leave the temperature at 0"):
        drafting(PROMPTS, new_tokens=1, sampling=Sampling(temperature=1))
    with pytest.raises(UsageError, match="no draft stage"):
        Generator(restore_model(Weights.open(folders[1])), speculative=True)
    write_checkpoint(tmp_path / "hf", tiny_config(), mtp=False)
    hf_to_orbax(tmp_path / "hf", tmp_path / "without")
    hf_to_orbax(folders[0], tmp_path / "chosen", layers=[0, 1, 2, 3])
    for name in ("without", "chosen"):
        weights = Weights.open(tmp_path / name)
        assert weights.config.num_mtp_stages == 0
        assert not len(restore_model(weights).mtp)
        with pytest.raises(
            UsageError, match=r"no draft stage \(mtp or DSpark\) to draft tokens with: its source has none, or was conv"
        ):
            restore_model(weights, drafts=True)


def test_a_conversion_of_an_earlier_version_lacks_its_stage(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Its manifest counts a stage whose tensors were left out. All else can be done with it."""
    write_checkpoint(tmp_path / "hf", tiny_config())  # that of the committed golden
    hf_to_orbax(tmp_path / "hf", tmp_path / "old", layers=[0, 1, 2, 3], storage=Storage.SOURCE)
    manifest = open_store(tmp_path / "old").manifest
    told = json.loads(json.dumps(manifest.metadata))
    told["config"]["num_mtp_stages"] = 1
    told["tensors"]["dropped"] = {"speculative-decoding stage": 75}
    old = dataclasses.replace(manifest, metadata=told)
    (tmp_path / "old" / "dsv4_manifest.json").write_bytes(old.to_bytes())
    weights = Weights.open(tmp_path / "old")
    assert weights.config.num_mtp_stages == 1
    assert not len(restore_model(weights).mtp)
    with pytest.raises(UsageError, match="an earlier version of dsv4 left it out; convert the source again"):
        restore_model(weights, drafts=True)
    golden = Path(__file__).parents[2] / "golden" / "data" / "tiny"
    assert run_parity(tmp_path / "old", golden, ParityOptions(layers=[1], taps=["attn_norm"])).passed
    assert compare_with_source(open_store(tmp_path / "old"), tmp_path / "hf") == []
    orbax_to_hf(tmp_path / "old", tmp_path / "back")


def test_the_command(folders: tuple[Path, Path], model: Callable[..., Model]) -> None:
    expected = Generator(model(None))(PROMPTS, new_tokens=NEW)
    ids = ";".join(",".join(map(str, prompt)) for prompt in PROMPTS)
    arguments = ["generate", str(folders[1]), "--tokens", ids, "-n", str(NEW), "--json", "-", "--speculative"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["tokens"] == expected
    drafts = told["drafts"]
    assert 0 <= drafts["accepted"] < drafts["drafted"] == len(PROMPTS) * (NEW - 1) - drafts["accepted"]
    assert f"drafted {drafts['drafted']} tokens, of which the model accepted {drafts['accepted']}" in done.stderr
    refused = CliRunner().invoke(app, [*arguments, "--temperature", "1"])
    assert (refused.exit_code, "leave --temperature at 0" in refused.stderr) == (2, True)
