"""Prompts: ids from the command line or a file, text through a real tokenizer, random ones from a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.golden.tokens import (
    check_tokens,
    encode_text,
    parse_tokens,
    prompt_tokens,
    random_tokens,
    token_decoder,
)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("5", [[5]]),
        ("1,2,3", [[1, 2, 3]]),
        (" 1 2  3 ", [[1, 2, 3]]),
        ("1,2;3,4", [[1, 2], [3, 4]]),
        ("[1, 2]", [[1, 2]]),
        ("[[1, 2], [3, 4]]", [[1, 2], [3, 4]]),
        ("-2147483648,2147483647", [[-(2**31), 2**31 - 1]]),
    ],
)
def test_ids_in_every_spelling_and_from_a_file(argument: str, expected: list[list[int]], tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text(argument)
    np.save(tmp_path / "ids.npy", np.array(expected))
    for found in (
        parse_tokens(argument),
        parse_tokens(str(tmp_path / "ids.txt")),
        parse_tokens(str(tmp_path / "ids.npy")),
    ):
        assert found.dtype == np.int32
        assert found.tolist() == expected


@pytest.mark.parametrize(
    "argument", ["1,2;3", "[[1], [2, 3]]", "[]", "1;;2", "1.5,2", "nowhere.json", "[1, {}]", "2147483648"]
)
def test_what_is_no_prompt_is_refused(argument: str) -> None:
    with pytest.raises(UsageError):
        parse_tokens(argument)


def test_a_file_has_one_prompt_per_line(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("\n1,2\n3 4\n\n5,6;7,8\n")
    assert parse_tokens(str(tmp_path / "ids.txt")).tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    (tmp_path / "ragged.txt").write_text("1,2\n3\n")
    with pytest.raises(UsageError, match=r"ragged\.txt: prompts of one golden have the same number"):
        parse_tokens(str(tmp_path / "ragged.txt"))


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(BadInput, match=r"ids\.npy"):
        parse_tokens(str(tmp_path / "ids.npy"))


def test_text_goes_through_the_checkpoint_s_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"the": 3, "sea": 7, "[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert encode_text(tmp_path / "tokenizer.json", ["the sea", "sea the"]).tolist() == [[3, 7], [7, 3]]
    assert prompt_tokens(tmp_path, 10, tokens=None, text="the blue sea", random=None, seed=0).tolist() == [[3, 0, 7]]
    with pytest.raises(UsageError, match="same number of tokens"):
        encode_text(tmp_path / "tokenizer.json", ["the sea", "sea"])
    with pytest.raises(BadInput, match=r"tokenizer\.json: no such file"):
        encode_text(tmp_path / "x" / "tokenizer.json", ["the sea"])


def test_ids_become_text_where_a_tokenizer_is_at_hand(tmp_path: Path) -> None:
    assert token_decoder(None, required=False)(7) == "7"
    assert token_decoder(tmp_path, required=False)(7) == "7"
    with pytest.raises(BadInput, match=r"tokenizer\.json: no such file"):
        token_decoder(tmp_path, required=True)
    Tokenizer(models.WordLevel({"the": 3, "sea": 7}, unk_token="the")).save(str(tmp_path / "tokenizer.json"))
    for where in (tmp_path, tmp_path / "tokenizer.json"):
        assert token_decoder(where, required=True)(7) == "7 'sea'"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="not a tokenizer file"):
        token_decoder(tmp_path, required=False)


def test_random_prompts_repeat(tmp_path: Path) -> None:
    first = prompt_tokens(tmp_path, 96, tokens=None, text=None, random="3x129", seed=5)
    assert first.shape == (3, 129)
    assert np.array_equal(first, random_tokens(96, batch=3, length=129, seed=5))
    assert not np.array_equal(first, random_tokens(96, batch=3, length=129, seed=6))
    assert prompt_tokens(tmp_path, 96, tokens=None, text=None, random="300", seed=0).shape == (1, 300)


@pytest.mark.parametrize("random", ["0", "x", "3x", "-3", "3x4x5", "3x0", "three"])
def test_impossible_sizes(random: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a number of tokens"):
        prompt_tokens(tmp_path, 96, tokens=None, text=None, random=random, seed=0)


def test_exactly_one_prompt(tmp_path: Path) -> None:
    for tokens, random in ((None, None), ("1", "3")):
        with pytest.raises(UsageError, match="exactly one of"):
            prompt_tokens(tmp_path, 96, tokens=tokens, text=None, random=random, seed=0)


def test_ids_are_inside_the_vocabulary_and_the_context() -> None:
    with pytest.raises(UsageError, match="outside the vocabulary of 5, such as 5"):
        check_tokens(np.array([0, 5]), vocab_size=5, max_length=9)
    with pytest.raises(UsageError, match="outside the vocabulary"):
        check_tokens(np.array([-1]), vocab_size=5, max_length=9)
    with pytest.raises(UsageError, match="max_position_embeddings leaves 1"):
        check_tokens(np.array([0, 1]), vocab_size=5, max_length=1)


@pytest.mark.parametrize("text", ["[" * 100_000, "[1, " + "9" * 5000 + "]"])
def test_json_that_python_does_not_take(text: str, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text(text)
    with pytest.raises(UsageError, match=r"ids\.json: (JSON nested too deeply|not JSON)"):
        parse_tokens(str(tmp_path / "ids.json"))
