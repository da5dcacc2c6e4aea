"""The token map of V4.1's engrams: tokens that are alike but for case, accents and blanks get one id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dsv4_convert.errors import BUGS, BadInput, UsageError
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.v41.config import V41Config

Array = np.ndarray[Any, Any]
TOKENIZER_FILE = "tokenizer.json"
#: Stands for a token that is a single space while blanks are stripped from the others.
_SPACE = "\ue000"
#: The text that a tokenizer gives for a part of a character.
_INCOMPLETE = "\ufffd"


def token_map(folder: Path, config: Config) -> Array:
    """The mapped id of every token of the vocabulary, int32 ``[V]``, from the tokenizer in a checkpoint's ``folder``.

    Every token's text is normalised; tokens of equal text have the same id, in the order in which texts first occur. A
    token that is part of a character is kept by its own form. Ids beyond the tokenizer's tokens, which no text has, are
    mapped like the padding token.

    Source: published inference code of V4.1, ``build_compressed_token_map``.

    Raises:
        BadInput: no tokenizer, or one with another number of ids than the config states, on which every hash depends.
        UsageError: the package ``tokenizers`` is missing.
    """
    assert isinstance(config, V41Config)
    assert config.engram is not None
    file = folder / TOKENIZER_FILE
    keys = _keys(file)
    ids: dict[str, int] = {}
    mapped = [ids.setdefault(key, len(ids)) for key in keys]
    stated = config.engram.compressed_vocab_size
    if len(ids) != stated:
        raise BadInput(
            f"{file}: its {len(keys)} tokens map to {len(ids)} ids, engram_compressed_vocab_size says {stated}; it is "
            "not this model's tokenizer, fetch that of the model's repository"
        )
    pad = config.engram.pad_token_id
    if len(mapped) > config.vocab_size or pad >= len(mapped):
        raise BadInput(f"{file}: {len(mapped)} tokens, expected {pad + 1} to {config.vocab_size} (vocab_size)")
    return np.array(mapped + [mapped[pad]] * (config.vocab_size - len(mapped)), np.int32)


def _keys(file: Path) -> list[str]:
    """One text for each token; tokens of the same text get the same id."""
    try:
        from tokenizers import Regex, Tokenizer, normalizers
    except ImportError:
        raise UsageError(
            "V4.1 maps tokens by its tokenizer, which needs the package tokenizers: "
            "pip install 'dsv4-convert[reference]'"
        ) from None
    if not file.is_file():
        raise BadInput(f"{file}: no such file; V4.1 maps tokens by it, fetch it from the model's repository")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except BUGS:
        raise
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"{file}: not a tokenizer file ({error})") from None
    steps = (
        normalizers.NFKC(),
        normalizers.NFD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        normalizers.Replace(Regex("^ $"), _SPACE),
        normalizers.Strip(),
        normalizers.Replace(_SPACE, " "),
    )
    normal = normalizers.Sequence(list(steps))

    def key(token: int) -> str:
        text: str = tokenizer.decode([token], skip_special_tokens=False)
        if _INCOMPLETE in text:
            return str(tokenizer.id_to_token(token))
        return normal.normalize_str(text) or text

    return [key(token) for token in range(tokenizer.get_vocab_size(with_added_tokens=True))]
