"""A model whose routed experts come from the disk says what the same model says from memory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dsv4_convert.cli import app
from dsv4_convert.convert import Storage, hf_to_orbax
from dsv4_convert.errors import ResourceError, UsageError
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.serve.from_disk import MemoryPlan, ModelFromDisk, plan_memory
from dsv4_convert.serve.generate import Generator, Sampling
from dsv4_convert.weights.converted import Weights
from dsv4_convert.weights.published import PublishedWeights
from dsv4_convert.weights.restore import restore_model

#: CSA with hash routing, and HCA with learned routing.
LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "num_hash_layers": 1, "compress_ratios": [4, 128, 0]}
NEW = 12
PROMPTS = [np.random.default_rng(length).integers(2, 96, length).tolist() for length in (1, 9, 27)]
FLOAT32 = np.dtype(np.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model: published in codes, converted as codes and expanded."""
    work = tmp_path_factory.mktemp("disk")
    write_checkpoint(work / "hf", tiny_config(**LAYERS), seed=0, form="fp4")
    for storage in (Storage.SOURCE, Storage.FLOAT32):
        hf_to_orbax(work / "hf", work / storage, storage=storage)
    return {"published": work / "hf", "source": work / "source", "float32": work / "float32"}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, list[list[int]]]:
    """The tokens of the model in memory: greedy and sampled, prompts of unequal lengths."""
    generator = Generator(restore_model(Weights.open(folders["source"])))
    return {name: generator(PROMPTS, new_tokens=NEW, sampling=sampling) for name, sampling in _samplings().items()}


def _samplings() -> dict[str, Sampling]:
    return {"greedy": Sampling(), "sampled": Sampling(temperature=1, top_p=0.9, seed=3)}


def _from_disk(weights: Any, *, cached: int) -> ModelFromDisk:
    plan = plan_memory(weights, FLOAT32, prompts=len(PROMPTS), room=NEW + max(map(len, PROMPTS)), limit=0)
    fixed = plan.resident + plan.state + plan.work
    return ModelFromDisk(weights, FLOAT32, plan=dataclasses.replace(plan, limit=fixed + cached * plan.expert))


def test_the_same_tokens_from_the_disk(
    folders: dict[str, Path], expected: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a cache of one expert and of all of them; prompts in several chunks."""
    assert expected["greedy"] != expected["sampled"]
    assert len(set(expected["greedy"][1])) > 2
    monkeypatch.setattr(ModelFromDisk, "chunk", 8)
    weights = Weights.open(folders["source"])
    all_experts = weights.config.num_hidden_layers * weights.config.n_routed_experts
    for cached in (1, all_experts):
        model = _from_disk(weights, cached=cached)
        generator = Generator(model)
        for name, sampling in _samplings().items():
            assert generator(PROMPTS, new_tokens=NEW, sampling=sampling) == expected[name], (cached, name)
        requests, pace = model._experts.requests, model.pace
        assert pace is not None
        assert pace.tokens == 2 * (NEW - 1)
        if cached == 1:
            assert requests.read > 0.9 * requests.asked
            assert pace.hit_rate < 0.1
        else:
            assert requests.read <= all_experts
            assert pace.hit_rate > 0.9


@pytest.mark.parametrize("kind", ["published", "float32"])
def test_other_forms(folders: dict[str, Path], expected: dict[str, list[list[int]]], kind: str) -> None:
    """A published folder, and a checkpoint that holds no codes."""
    weights: Any = PublishedWeights.open(folders[kind]) if kind == "published" else Weights.open(folders[kind])
    assert Generator(_from_disk(weights, cached=3))(PROMPTS, new_tokens=NEW) == expected["greedy"]


def test_experts_of_padding_and_of_ended_prompts_are_not_read(folders: dict[str, Path]) -> None:
    weights = Weights.open(folders["source"])
    model = _from_disk(weights, cached=1)
    Generator(model)([[5]], new_tokens=1)
    config = weights.config
    assert model._experts.requests.asked == config.num_hidden_layers * config.num_experts_per_tok


def test_the_plan_is_what_is_held(folders: dict[str, Path]) -> None:
    import jax

    weights = Weights.open(folders["source"])
    model = _from_disk(weights, cached=2)
    held = sum(part.nbytes for part in jax.tree.leaves((model._head, [state for _, state in model._layers])))
    assert model.plan.resident == held
    assert sum(part.nbytes for part in jax.tree.leaves(model._read_expert(1, 0))) == model.plan.expert
    with pytest.raises(ResourceError, match=r"a limit of 1\.0 kB, and .* are needed: .* raise --max-memory"):
        MemoryPlan(resident=800, state=100, work=50, expert=60, limit=1000).cached_experts  # noqa: B018


def test_the_command(folders: dict[str, Path], expected: dict[str, list[list[int]]]) -> None:
    ids = ";".join(",".join(map(str, prompt)) for prompt in PROMPTS)
    run = CliRunner().invoke
    arguments = ["generate", str(folders["source"]), "--tokens", ids, "-n", str(NEW), "--stream-weights"]
    done = run(app, [*arguments, "--json", "-", "--max-memory", "100MB"])
    assert done.exit_code == 0, done.output
    outcome = json.loads(done.stdout)
    assert outcome["tokens"] == expected["greedy"]
    assert outcome["weights"] == "streamed"
    assert outcome["pace"]["tokens"] == NEW - 1
    assert "routed experts of" in done.stderr
    assert "read a token" in done.stderr
    done = run(app, [*arguments, "--max-memory", "10kB"])
    assert done.exit_code == ResourceError.exit_code
    assert "of weights that every token needs" in done.stderr
    for wrong in (["--speculative"], ["--weights", "source"]):
        assert run(app, [*arguments, *wrong]).exit_code == UsageError.exit_code
    assert run(app, [*arguments[:-1], "--max-memory", "1GB"]).exit_code == UsageError.exit_code
