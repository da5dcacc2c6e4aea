"""Speculative decoding with DSpark's blocks: the tokens are those of plain greedy decoding, whatever is accepted."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from typer.testing import CliRunner

from dsv4_convert.cli import app
from dsv4_convert.convert import Storage, hf_to_orbax
from dsv4_convert.golden.synthetic import dspark_config, tiny_v41_config, write_checkpoint
from dsv4_convert.model import Taps
from dsv4_convert.model.model import Decoder
from dsv4_convert.serve import speculate
from dsv4_convert.serve.generate import Generator
from dsv4_convert.serve.speculate import Drafts
from dsv4_convert.weights.converted import Weights
from dsv4_convert.weights.restore import restore_model

#: Past the window of 16 and blocks of 4 while the new tokens come; 1 leaves nothing to read before.
NEW, BLOCK = 24, 5
PROMPTS = [np.random.default_rng(length).integers(2, 96, length).tolist() for length in (1, 5, 13, 140)]
#: How much of its outputs an :func:`_agreeing` model's layer adds to the streams, where some drafts are right.
MIXED = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dated release, converted with its published codes; the Markov head has the rank of a token's embedding."""
    work = tmp_path_factory.mktemp("dspark")
    write_checkpoint(work / "hf", dspark_config(dspark_markov_rank=32), seed=0)
    hf_to_orbax(work / "hf", work / "orbax", storage=Storage.SOURCE)
    return work / "orbax"


def _damped(model: Decoder, share: float) -> None:
    for block in model.layers:
        if getattr(block, "engram", None) is not None:
            block.engram.wkv[...] *= share
        block.attn.wo_b[...] *= share
        block.ffn.experts.w2[...] *= share
        block.ffn.shared_experts.w2[...] *= share


def _without_halves(model: Decoder) -> jax.Array:
    """Each token's input of the output head where the halves of all layers give nothing."""
    _damped(model, 0.0)
    graph, state = nnx.split(model)

    def norm(state: nnx.State, tokens: jax.Array) -> jax.Array:
        taps = Taps("norm".__eq__)
        nnx.merge(graph, state)(tokens, taps=taps)
        return taps.values["norm"][:, 0]

    return jax.jit(norm)(state, jnp.arange(model.config.vocab_size)[:, None])


def _agreeing(model: Decoder, alone: jax.Array, share: float) -> Decoder:
    """A model that looks at the last token most of all, and drafts that are what it would say of that token alone.

    The outputs of all halves count ``share``. The Markov head alone decides the drafts: its table has each token's
    input of the output head without the halves, ``alone``, and its matrix is that head.
    """
    _damped(model, share)
    last = model.mtp[-1]
    last.norm[...] = jnp.zeros_like(last.norm[...])
    last.markov_head.markov_w1[...] = alone
    last.markov_head.markov_w2[...] = model.head[...]
    return model


@pytest.fixture(scope="module")
def model(folder: Path) -> Callable[[float | None], Decoder]:
    """The converted model as it is (None), or :func:`_agreeing`."""

    def restored() -> Decoder:
        return restore_model(Weights.open(folder), drafts=True)

    alone = cache(lambda: _without_halves(restored()))

    @cache
    def made(share: float | None) -> Decoder:
        return restored() if share is None else _agreeing(restored(), alone(), share)

    return made


@pytest.fixture(scope="module")
def greedy(model: Callable[[float | None], Decoder]) -> Callable[[float | None], list[list[int]]]:
    known: dict[float | None, list[list[int]]] = {}

    def tokens(share: float | None) -> list[list[int]]:
        if share not in known:
            known[share] = Generator(model(share))(PROMPTS, new_tokens=NEW)
        return known[share]

    return tokens


@pytest.mark.parametrize("share", [None, MIXED, 0.0])
def test_tokens_are_those_of_plain_greedy_decoding(
    model: Callable[[float | None], Decoder], greedy: Callable[..., list[list[int]]], share: float | None
) -> None:
    """The longest prompt and its new tokens fill the cache to the last place."""
    drafting = Generator(model(share), speculative=True)
    assert drafting(PROMPTS, new_tokens=NEW) == greedy(share)
    drafted, accepted = drafting.drafts.drafted, drafting.drafts.accepted
    if share == 0:
        # The first pass gives a token, each other one a block and one more; the last block has no room for the one.
        assert drafting.drafts == Drafts(len(PROMPTS) * 20, len(PROMPTS) * 20)
    elif share == MIXED:
        assert 0.1 < accepted / drafted < 0.9, "blocks have to end early and late"
    else:
        assert 0 <= accepted < drafted


def test_every_length_ends_where_it_should(model: Callable[[float | None], Decoder]) -> None:
    made = model(MIXED)
    plain, drafting = Generator(made), Generator(made, speculative=True)
    room = len(PROMPTS[-1]) + NEW  # as much as in the other tests, so that their programs serve
    for new_tokens in (0, 1, 2, BLOCK, BLOCK + 1, BLOCK + 2):
        prompts = [*PROMPTS[:-1], (2 * PROMPTS[-1])[: room - new_tokens]]
        assert drafting(prompts, new_tokens=new_tokens) == plain(prompts, new_tokens=new_tokens)


def test_a_stop_token_ends_its_prompt_in_the_middle_of_a_block(
    model: Callable[[float | None], Decoder], greedy: Callable[..., list[list[int]]]
) -> None:
    """The second pass accepts a whole block: tokens 1 to 6."""
    free = greedy(0.0)
    drafting = Generator(model(0.0), speculative=True)
    for row, new in enumerate(free):
        for at in (1, 3, 6):
            stop = new[at]
            found = drafting(PROMPTS, new_tokens=NEW, stop=[stop])
            assert found[row] == new[: new.index(stop) + 1]
            assert found == [text[: text.index(stop) + 1] if stop in text else text for text in free]


def test_two_programs_serve_every_call_of_a_shape(model: Callable[[float | None], Decoder]) -> None:
    def programs() -> tuple[int, int]:
        return speculate.prefill._cache_size(), speculate.verify._cache_size()

    drafting, before = Generator(model(MIXED), speculative=True), programs()
    drafting(PROMPTS, new_tokens=NEW)
    after = programs()
    assert max(now - then for now, then in zip(after, before, strict=True)) <= 1
    for given in (PROMPTS[::-1], [[7]] * 3 + [PROMPTS[-1]]):
        drafting(given, new_tokens=NEW)
    assert programs() == after


def test_published_codes_draft_as_decoded_weights_do(folder: Path, greedy: Callable[..., list[list[int]]]) -> None:
    encoded = restore_model(Weights.open(folder), drafts=True, encoded=True)
    decoded = restore_model(Weights.open(folder), drafts=True)
    assert type(encoded.mtp[0].main_proj.get_value()).__name__ == "Encoded"
    drafting, other = Generator(encoded, speculative=True), Generator(decoded, speculative=True)
    assert drafting(PROMPTS, new_tokens=NEW) == other(PROMPTS, new_tokens=NEW) == greedy(None)
    assert drafting.drafts == other.drafts


def test_the_command(folder: Path, greedy: Callable[..., list[list[int]]]) -> None:
    ids = ";".join(",".join(map(str, prompt)) for prompt in PROMPTS)
    arguments = ["generate", str(folder), "--tokens", ids, "-n", str(NEW), "--json", "-", "--speculative"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["tokens"] == greedy(None)
    drafted, accepted = (told["drafts"][part] for part in ("drafted", "accepted"))
    share = f"{accepted / drafted:.0%}"
    assert f"drafted {drafted} tokens, of which the model accepted {accepted} ({share})" in done.stderr


def test_stages_of_v41_draft_too(tmp_path: Path) -> None:
    """A pair, an n-gram and a candidate block end among drafts that are dropped again; every prompt has a length."""
    layers = {
        "num_hidden_layers": 4,
        "compress_ratios": [0, 2, 1, 1, 0, 0, 0],
        "kv_source_layer_ids": [1, 2],
        "index_source_layer_ids": [1, 2, 3],
        "candidate_source_layer_id": 2,
        "engram_layer_ids": [1],
        "dspark_target_layer_ids": [1, 2, 3],
        "dspark_markov_rank": 64,
    }
    write_checkpoint(tmp_path / "hf", tiny_v41_config(**layers), seed=0)
    hf_to_orbax(tmp_path / "hf", tmp_path / "orbax", storage=Storage.SOURCE)
    model, other = (restore_model(Weights.open(tmp_path / "orbax"), drafts=True) for _ in range(2))
    made = _agreeing(model, _without_halves(other), MIXED)
    prompts = [prompt[:23] for prompt in PROMPTS]
    drafting = Generator(made, speculative=True)
    assert drafting(prompts, new_tokens=NEW) == Generator(made)(prompts, new_tokens=NEW)
    assert 0.1 < drafting.drafts.accepted / drafting.drafts.drafted < 0.9, "blocks have to end early and late"
