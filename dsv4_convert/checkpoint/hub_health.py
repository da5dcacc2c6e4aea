"""Whether the Hub client of this machine can do its work: its folder, its token, the way to the Hub."""

from __future__ import annotations

from pathlib import Path

import httpx2
from huggingface_hub import constants, get_token


def cache_folder() -> Path:
    """Where downloads go, whether it exists or not."""
    return Path(constants.HF_HUB_CACHE).expanduser()


def endpoint() -> str:
    """The Hub that is asked."""
    return constants.ENDPOINT


def has_token() -> bool:
    """Whether the client has a token to send. The token itself goes nowhere from here."""
    return get_token() is not None


def unreachable(timeout: float) -> str | None:
    """Why the Hub does not answer within ``timeout`` seconds; None if it does, whatever it says."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        httpx2.head(constants.ENDPOINT, timeout=timeout)
    except httpx2.HTTPError as error:
        return str(error) or type(error).__name__
    return None
