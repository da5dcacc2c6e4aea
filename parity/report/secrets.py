"""URLs that can be passed on: a report names its golden, and a golden may be behind a URL that opens it for anybody."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: User and password; the password may contain an @.
_USER = re.compile(r"(\w+://)[^/\s'\"]*@")
#: A query or a fragment, where signatures are.
_SIGNED = re.compile(r"(\w+://[^\s?#'\"]*)([?#])[^\s'\"]*")


def without_secrets(text: str) -> str:
    """Names, passwords and signatures out of the URLs in a text."""
    return _SIGNED.sub(r"\1\2…", _USER.sub(r"\1…@", text))


def all_without_secrets(value: Any) -> Any:
    """:func:`without_secrets` of every text in nested values, whose tuples become lists as in JSON."""
    if isinstance(value, Mapping):
        return {key: all_without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [all_without_secrets(item) for item in value]
    return without_secrets(value) if isinstance(value, str) else value
