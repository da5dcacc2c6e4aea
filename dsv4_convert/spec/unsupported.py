"""Models of the family that are not supported: recognised by their config and tensor names, before anything is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dsv4_convert.errors import BadInput, listed
from dsv4_convert.show.units import number_of
from dsv4_convert.spec.architectures import BY_MODEL_TYPE
from dsv4_convert.spec.v4.config import V4Config

#: A component of a tensor's name that no DeepSeek-V4 has, and the feature that it belongs to.
_ENGRAM, _FEATURE = "engram", "V4.1 engram memory"

#: Pattern of a field of ``config.json`` that no DeepSeek-V4 has.
_FIELDS = r"text_config|vision_config|(image|engram)_\w+"

_FAMILY = "deepseek_v4"
_SUPPORTED = "V4-Flash and V4-Pro, their Base variants, dated releases and Vision-Exp, and V4.1-Flash"
#: Names of each kind that a message shows.
_SHOWN = 4


def refuse_unsupported(raw: Mapping[str, Any], tensors: Iterable[str], *, where: str) -> None:
    """Refuse what looks like DeepSeek-V4 and has parts of another model, in one message.

    The config and the table of names of a later architecture know its parts themselves.

    Args:
        raw: ``config.json`` as it is.
        tensors: every tensor name of the checkpoint.
        where: its folder, for the message.

    Raises:
        BadInput: it is such a model. The message says which, and lists the fields and tensors that give it away.
    """
    if BY_MODEL_TYPE.get(str(raw.get("model_type")), V4Config) is not V4Config:
        return
    fields = [_told(raw, name) for name in raw if _gives_away(raw, name)]
    engrams = sorted(name for name in tensors if _ENGRAM in name.split("."))
    if not fields and not engrams:
        return
    lines = [f"config.json has {_first(fields)}"] if fields else []
    if engrams:
        lines.append(f"{_FEATURE} is not supported: {number_of(len(engrams), 'tensor')} such as {_first(engrams)}")
    raise BadInput(
        f"{where}: {_model(raw)}, which dsv4 does not support. It has:\n{listed(lines)}\ndsv4 converts {_SUPPORTED}."
    )


def _gives_away(raw: Mapping[str, Any], name: str) -> bool:
    if name == "model_type":
        return str(raw[name]).startswith(_FAMILY) and raw[name] != _FAMILY
    return of_family(raw) and re.fullmatch(_FIELDS, name) is not None


def of_family(raw: Mapping[str, Any]) -> bool:
    """Whether the config is that of some DeepSeek-V4; of any other model it is :class:`Config` that says so."""
    return str(raw.get("model_type", _FAMILY)).startswith(_FAMILY)


def _model(raw: Mapping[str, Any]) -> str:
    found = raw.get("model_type", _FAMILY)
    return "DeepSeek-V4 with parts of V4.1" if found == _FAMILY else f"model_type {found!r}"


def _told(raw: Mapping[str, Any], name: str) -> str:
    return f"model_type {raw[name]!r}" if name == "model_type" else name


def _first(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
