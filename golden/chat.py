"""The chat template of a checkpoint: how its makers put a message into the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.files.strict_json import read_object

#: Files of the model's repository, beside ``tokenizer.json``.
_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def chat_prompt(tokenizer: Path, message: str) -> tuple[str, str | None]:
    """The prompt for one message of a user, and the text of the token that ends an answer, if it is named.

    The template is a program of the checkpoint's makers. It runs in Jinja's sandbox, and sees the message alone.

    Args:
        tokenizer: ``tokenizer.json``, beside which the template lies.
        message: what the user says.

    Raises:
        UsageError: the checkpoint has no chat template.
        BadInput: the template cannot be read, or refuses the message.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    folder = tokenizer.parent
    config = read_object(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    where, template = _template(folder, config)
    tokens = {name: _token(config.get(name)) for name in ("bos_token", "eos_token")}
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    try:
        prompt = environment.from_string(template).render(
            messages=[{"role": "user", "content": message}],
            add_generation_prompt=True,
            **{name: text or "" for name, text in tokens.items()},
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise BadInput(f"{where}: the chat template fails: {error}; give the whole prompt without --chat") from None
    return prompt, tokens["eos_token"]


def _template(folder: Path, config: Mapping[str, Any]) -> tuple[Path, str]:
    """The file that has the template, and the template; of several, the one called ``default``."""
    file = folder / _TEMPLATE
    if file.is_file():
        try:
            return file, file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{file}: cannot be read ({error})") from None
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise UsageError(
            f"--chat: no chat template in {folder}: expected {_TEMPLATE}, or chat_template in {_CONFIG}, from the "
            "model's repository; or give the whole prompt without --chat"
        )
    return folder / _CONFIG, found


def _token(value: object) -> str | None:
    """The text of a special token, which may be an object with more about it."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _refuse(message: str) -> None:
    """The function that templates call for messages that they do not take."""
    raise ValueError(message)
