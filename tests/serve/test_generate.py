"""Generation against transformers' own, on small checkpoints of every form."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import DeepseekV4ForCausalLM
from typer.testing import CliRunner

from dsv4_convert.cli import app
from dsv4_convert.cli.stream import Stream
from dsv4_convert.convert import Storage, hf_to_orbax
from dsv4_convert.errors import ResourceError, UsageError
from dsv4_convert.golden.chat import chat_prompt
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.serve.generate import Generator, Sampling, _drawn
from dsv4_convert.weights.converted import Weights
from dsv4_convert.weights.restore import restore_model

#: The same for every test, so that the generator's two programs serve them all.
NEW = 24
PROMPTS = [np.random.default_rng(length).integers(2, 96, length).tolist() for length in (1, 13, 140)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of BF16 weights, and what it was converted to."""
    work = tmp_path_factory.mktemp("generate")
    write_checkpoint(work / "hf", tiny_config(), seed=0, form="bf16")
    hf_to_orbax(work / "hf", work / "orbax", storage=Storage.FLOAT32)
    return work / "hf", work / "orbax"


@pytest.fixture(scope="module")
def generator(folders: tuple[Path, Path]) -> Generator:
    return Generator(restore_model(Weights.open(folders[1])))


def _reference(folder: Path, prompt: list[int], new_tokens: int) -> list[int]:
    model = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").float()
    ids = torch.tensor([prompt])
    # With a mask of its own it does not take tokens that have the padding's id for padding.
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(ids, max_new_tokens=new_tokens, **options)
    return found[0, len(prompt) :].tolist()


def test_greedy_tokens_are_those_of_transformers(folders: tuple[Path, Path], generator: Generator) -> None:
    """Prompts of three lengths at once, each past the window in the end, against one prompt at a time."""
    found = generator(PROMPTS, new_tokens=NEW)
    for prompt, new in zip(PROMPTS, found, strict=True):
        assert new == _reference(folders[0], prompt, NEW)
    assert len({tuple(new) for new in found}) == 3


def test_a_stop_token_ends_its_prompt_only(generator: Generator) -> None:
    free = generator(PROMPTS, new_tokens=NEW)
    stop = next(token for token in free[0] if token not in free[1] + free[2])
    seen: list[tuple[int, int]] = []
    found = generator(PROMPTS, new_tokens=NEW, stop=[stop], on_token=lambda *new: seen.append(new))
    assert found == [free[0][: free[0].index(stop) + 1], *free[1:]]
    assert [token for row, token in seen if row == 0] == found[0]


def test_sampling_is_seeded_and_follows_the_distribution() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))
    keys = jax.random.split(jax.random.key(0), 4000)

    def shares(temperature: float, top_k: int, top_p: float) -> list[float]:
        drawn = np.asarray(jax.vmap(lambda key: _drawn(logits, key, temperature, top_k, top_p)[0])(keys))
        return (np.bincount(drawn, minlength=4) / len(keys)).tolist()

    assert shares(1.0, 0, 1.0) == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.03)
    assert shares(1.0, 2, 1.0) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.03)
    # 0.5 and 0.25 are 0.75, so the third is needed for 0.8.
    assert shares(1.0, 0, 0.8) == pytest.approx([0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0], abs=0.03)
    assert shares(0.5, 0, 1.0) == pytest.approx((np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345).tolist(), abs=0.03)
    assert shares(0, 0, 1.0) == [1, 0, 0, 0]


def test_the_same_seed_gives_the_same_text(generator: Generator) -> None:
    one, same, other = (
        generator(PROMPTS, new_tokens=NEW, sampling=Sampling(temperature=1, seed=seed)) for seed in (0, 0, 1)
    )
    assert one == same
    assert one != other


@pytest.mark.parametrize(
    ("prompts", "new_tokens", "message"),
    [
        ([], 1, "without tokens"),
        ([[1], []], 1, "without tokens"),
        ([[1, 10**6]], 1, "outside the vocabulary"),
        ([[1]], 10**6, "max_position_embeddings"),
        ([[1]], -1, "none or more"),
    ],
)
def test_what_cannot_be_generated_is_said(generator: Generator, prompts, new_tokens: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        generator(prompts, new_tokens=new_tokens)


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_that_means_nothing_is_refused(options) -> None:
    with pytest.raises(UsageError):
        Sampling(**options)


def test_a_model_larger_than_the_memory_is_refused(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.read_text
    monkeypatch.setattr(
        Path, "read_text",
        lambda path, *a, **k: "MemAvailable: 100 kB\n" if str(path) == "/proc/meminfo" else real(path, *a, **k),
    )  # fmt: skip
    with pytest.raises(ResourceError, match="102,400 are available"):
        restore_model(Weights.open(folders[1]))


def test_a_chat(folders: tuple[Path, Path], generator: Generator, tmp_path: Path) -> None:
    """The template as transformers renders it; its end-of-turn token ends the answer; the text comes as it is made."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {f"w{index}": index for index in range(tiny_config()["vocab_size"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    template = (
        "{{ bos_token }}{% for message in messages %} {% if message.role == 'user' %}w7 {{ message.content }} w8\n"
        "{% else %}{{ raise_exception('only users speak') }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} w9{% endif %}"
    )
    arguments = [
        "generate",
        str(folders[1]),
        "--tokenizer",
        str(tmp_path),
        "--prompt",
        "w1 w2",
        "--chat",
        "-n",
        str(NEW),
    ]
    run = CliRunner().invoke
    without = run(app, arguments)
    assert without.exit_code == 2
    assert "no chat template in" in without.stderr
    ids = [3, 7, 1, 2, 8, 9]
    (expected,) = generator([ids], new_tokens=NEW)
    config = {"chat_template": template, "bos_token": {"content": "w3"}, "eos_token": f"w{expected[2]}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="w3", eos_token="w0", chat_template=template
    )
    said = theirs.apply_chat_template(
        [{"role": "user", "content": "w1 w2"}], tokenize=False, add_generation_prompt=True
    )
    assert chat_prompt(tmp_path / "tokenizer.json", "w1 w2")[0] == said
    done = run(app, [*arguments, "--json", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["prompts"] == [ids]
    end = expected.index(expected[2])
    assert done.stdout.split() == [f"w{token}" for token in expected[: end + 1]]
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    refused = run(app, arguments)
    assert refused.exit_code == 3
    assert "the chat template fails: never" in refused.stderr
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    assert "unsafe" in run(app, arguments).stderr


def test_characters_of_several_tokens_are_printed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    pieces = {1: b"caf", 2: b"\xc3", 3: b"\xa9", 4: b"!"}
    stream = Stream(
        lambda tokens: b"".join(pieces[token] for token in tokens).decode(errors="replace"), "> ", err=False
    )
    printed = []
    for token in pieces:
        stream.add(token)
        printed.append(capsys.readouterr().out)
    stream.end()
    assert printed == ["> caf", "", "é", "!"]
    assert capsys.readouterr().out == "\n"


def test_the_command(folders: tuple[Path, Path], generator: Generator, tmp_path: Path) -> None:
    """Token ids on stdout; with a tokenizer the text; the same as JSON."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{index}": index for index in range(tiny_config()["vocab_size"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    expected = generator(PROMPTS, new_tokens=NEW)
    ids = ";".join(",".join(map(str, prompt)) for prompt in PROMPTS)
    texts = [part for prompt in PROMPTS for part in ("--prompt", " ".join(f"w{token}" for token in prompt))]
    run = CliRunner().invoke
    done = run(app, ["generate", str(folders[1]), "--tokens", ids, "-n", str(NEW)])
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == [",".join(map(str, row)) for row in expected]
    done = run(
        app,
        ["generate", str(folders[1]), *texts, "--tokenizer", str(tmp_path), "-n", str(NEW), "--json", "-"],
    )  # fmt: skip
    outcome = json.loads(done.stdout)
    assert outcome["tokens"] == expected
    assert "drafts" not in outcome
    assert outcome["texts"][1].split() == [f"w{token}" for token in expected[1]]
    short = PROMPTS[1][:6]  # as many tokens as test_a_chat has, whose programs serve
    one = ["generate", str(folders[1]), "--tokens", ",".join(map(str, short)), "-n", str(NEW)]
    (alone,) = generator([short], new_tokens=NEW)
    assert run(app, one).stdout == ",".join(map(str, alone)) + "\n"
    assert run(app, ["generate", str(folders[1])]).exit_code == 2
    assert run(app, ["generate", str(folders[1]), "--prompt", "w1"]).exit_code == 2
    assert run(app, ["generate", str(folders[1]), "--tokens", "1", "--chat"]).exit_code == 2
    assert run(app, ["generate", str(tmp_path / "none"), "--tokens", "1"]).exit_code == 3
