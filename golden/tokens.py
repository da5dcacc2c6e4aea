"""The prompt of a golden: token ids from an argument, a file, a text or a seed, always int32 ``[B, S]``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from dsv4_convert.errors import BUGS, BadInput, UsageError

Tokens: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]

TOKENIZER_NAME = "tokenizer.json"
_INLINE = frozenset("0123456789,; \t\n[]-")


def parse_tokens(argument: str) -> Tokens:
    """Token ids from a command line: ``1,2,3``, several prompts as ``1,2;3,4`` or JSON, or the path of a file.

    A file holds the same text, or one prompt per line, or is a ``.npy`` array of integers.

    Raises:
        UsageError: not token ids, or prompts of different length.
        BadInput: the file cannot be read.
    """
    return _as_tokens(*_ids(argument))


def parse_prompts(argument: str) -> list[list[int]]:
    """The same for prompts that may have different numbers of tokens."""
    value, where = _ids(argument)
    rows = list(value) if isinstance(value, list | np.ndarray) else []
    if rows and not any(isinstance(row, list | np.ndarray) for row in rows):
        rows = [rows]
    return [_as_tokens(list(row) if isinstance(row, np.ndarray) else row, where)[0].tolist() for row in rows]


def _ids(argument: str) -> tuple[object, str]:
    """The parsed but unchecked argument of a command line, and its origin."""
    if argument.strip() and set(argument) <= _INLINE:
        return _from_text(argument, "token ids"), "token ids"
    path = Path(argument)
    try:
        if path.suffix == ".npy":
            with path.open("rb") as stream:  # of a broken archive np.load would leave its own open
                return np.load(stream, allow_pickle=False), str(path)
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{argument}: neither token ids like 1,2,3 nor a file") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as token ids ({error})") from None
    return _from_text(text, str(path)), str(path)


def encode_text(tokenizer: Path, prompts: Sequence[str]) -> Tokens:
    """Token ids of one or more texts, special tokens as the checkpoint's ``tokenizer.json`` adds them.

    Raises:
        UsageError: the texts have different numbers of tokens, or the package ``tokenizers`` is missing.
        BadInput: the tokenizer cannot be read.
    """
    return _as_tokens(encode_prompts(tokenizer, prompts), "the texts")


def encode_prompts(tokenizer: Path, prompts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """Token ids of texts, which may have different numbers of them; ``special``: with those that begin a text.

    Raises:
        UsageError: the package ``tokenizers`` is missing.
        BadInput: the tokenizer cannot be read.
    """
    loaded = _load_tokenizer(tokenizer)
    return [loaded.encode(prompt, add_special_tokens=special).ids for prompt in prompts]


def token_of(tokenizer: Path, text: str) -> int | None:
    """The id of a token by its text; None if the vocabulary has no such token. Raises like :func:`encode_prompts`."""
    found: int | None = _load_tokenizer(tokenizer).token_to_id(text)
    return found


def text_decoder(tokenizer: Path) -> Callable[[Sequence[int]], str]:
    """A function from token ids to text, without special tokens. Raises like :func:`encode_prompts`."""
    loaded = _load_tokenizer(tokenizer)
    return lambda tokens: str(loaded.decode(list(tokens)))


def token_decoder(where: Path | None, *, required: bool) -> Callable[[int], str]:
    """A function that makes a token id readable: its text in quotes with a tokenizer, else the number.

    Args:
        where: ``tokenizer.json`` or the folder that may hold it; None for numbers.
        required: whether a missing tokenizer is an error.

    Raises:
        UsageError: the package ``tokenizers`` is missing, although a tokenizer is required.
        BadInput: the tokenizer is required and missing, or cannot be read.
    """
    file = None if where is None else tokenizer_file(where)
    if file is None or not (required or file.is_file()):
        return str
    try:
        loaded = _load_tokenizer(file)
    except UsageError:
        if required:
            raise
        return str
    return lambda token: f"{token} {loaded.decode([token], skip_special_tokens=False)!r}"


def tokenizer_file(where: Path) -> Path:
    """``tokenizer.json``, given itself or the folder that should hold it."""
    return where / TOKENIZER_NAME if where.is_dir() else where


def _load_tokenizer(file: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UsageError("a text needs the package tokenizers: pip install 'dsv4-convert[reference]'") from None
    if not file.is_file():
        raise BadInput(f"{file}: no such file; fetch it from the model's repository, or give token ids")
    try:
        return Tokenizer.from_file(str(file))
    except BUGS:
        raise
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"{file}: not a tokenizer file ({error})") from None


def random_tokens(vocab_size: int, *, batch: int, length: int, seed: int) -> Tokens:
    """Uniformly random ids; the same arguments give the same ids everywhere."""
    return np.random.default_rng(seed).integers(0, vocab_size, (batch, length), dtype=np.int32)


def check_tokens(tokens: np.ndarray[Any, Any], *, vocab_size: int, max_length: int) -> Tokens:
    """Ids as int32 ``[B, S]``, known to be inside the vocabulary. ``[S]`` is taken as one prompt.

    Raises:
        UsageError: no tokens, not integers, ids outside the vocabulary, or a prompt longer than the model's limit.
    """
    array = _as_tokens(tokens, "tokens")
    if array.shape[1] > max_length:
        raise UsageError(
            f"tokens: a prompt of {array.shape[1]} tokens, but max_position_embeddings leaves {max_length}"
        )
    wrong = array[(array < 0) | (array >= vocab_size)]
    if wrong.size:
        raise UsageError(f"tokens: {wrong.size} ids outside the vocabulary of {vocab_size}, such as {int(wrong[0])}")
    return array


def _from_text(text: str, where: str) -> object:
    if "[" in text:
        try:
            return json.loads(text)  # lists of numbers, in which there is nothing to understand differently
        except RecursionError:
            raise UsageError(f"{where}: JSON nested too deeply; expected rows of token ids") from None
        except ValueError as error:
            raise UsageError(f"{where}: not JSON ({error})") from None
    try:
        lines = [line for line in text.splitlines() if line.strip()]
        return [[int(item) for item in row.replace(",", " ").split()] for line in lines for row in line.split(";")]
    except ValueError as error:
        raise UsageError(f"{where}: not token ids like 1,2,3 ({error})") from None


def _as_tokens(value: object, where: str) -> Tokens:
    if isinstance(value, list) and value and all(isinstance(row, list) for row in value):
        lengths = sorted({len(row) for row in value})
        if len(lengths) > 1:
            raise UsageError(f"{where}: prompts of one golden have the same number of tokens, found {lengths}")
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise UsageError(f"{where}: not rows of token ids ({error})") from None
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "iu":
        raise UsageError(f"{where}: expected token ids [prompts, tokens], found {array.dtype} {list(array.shape)}")
    if array.max() > np.iinfo(np.int32).max or array.min() < np.iinfo(np.int32).min:
        raise UsageError(f"{where}: ids that are larger than any vocabulary")
    return array.astype(np.int32)


def prompt_tokens(
    folder: Path, vocab_size: int, *, tokens: str | None, text: str | None, random: str | None, seed: int
) -> Tokens:
    """The prompt that a command line asks for, in exactly one of three ways.

    Args:
        folder: the checkpoint, whose ``tokenizer.json`` encodes ``text``.
        vocab_size: of the model.
        tokens: see :func:`parse_tokens`.
        text: one prompt.
        random: ``300`` or ``3x129``: number of tokens, or prompts times tokens.
        seed: of the random tokens.

    Raises:
        UsageError: not exactly one of the three, or not understood.
        BadInput: a file cannot be read.
    """
    if sum(given is not None for given in (tokens, text, random)) != 1:
        raise UsageError("a prompt is needed: exactly one of --tokens, --text and --random")
    if tokens is not None:
        return parse_tokens(tokens)
    if text is not None:
        return encode_text(folder / TOKENIZER_NAME, [text])
    assert random is not None
    parts = random.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"--random {random}: expected a number of tokens, or prompts x tokens, such as 300 or 3x129")
    batch, length = (1, int(parts[0])) if len(parts) == 1 else (int(parts[0]), int(parts[1]))
    return random_tokens(vocab_size, batch=batch, length=length, seed=seed)
