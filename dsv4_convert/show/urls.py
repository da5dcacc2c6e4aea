"""URLs as they are shown: a URL may hold a user, a password or a signature, which open what it names to anybody."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: User and password; the password may contain an @. The host is hidden too if they have no clear end.
_UNCLEAR = re.compile(r"(://)[^/\s'\"?#]*[?#][^/\s'\"]*@[^/\s'\"]*")
_USER = re.compile(r"(://)[^/\s'\"]*@")
#: A query or a fragment, where signatures are.
_SIGNED = re.compile(r"(://[^\s?#'\"]*)([?#])[^\s'\"]*")
#: A URL by itself, in which quotes end nothing.
_ALONE = re.compile(r"[\w+.-]+://\S*")


def without_secrets(text: str) -> str:
    """A text, or a URL by itself, without the users, passwords and signatures of its URLs."""
    if "://" not in text:
        return text
    if _ALONE.fullmatch(text):
        text = text.replace("'", "%27").replace('"', "%22")
    return _SIGNED.sub(r"\1\2…", _USER.sub(r"\1…@", _UNCLEAR.sub(r"\1…", text)))


def all_without_secrets(value: Any) -> Any:
    """:func:`without_secrets` of every text in nested values, whose tuples become lists as in JSON."""
    if isinstance(value, Mapping):
        return {key: all_without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [all_without_secrets(item) for item in value]
    return without_secrets(value) if isinstance(value, str) else value
