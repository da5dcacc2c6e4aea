"""Whether the Hub client of this machine can do its work: its folder, its token, the way to the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, get_token
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

from dsv4_convert.files.remote import misconfigured
from dsv4_convert.show.urls import without_secrets


def cache_folder() -> Path:
    """Where downloads go, whether it exists or not."""
    return Path(constants.HF_HUB_CACHE).expanduser()


def endpoint() -> str:
    """The Hub that is asked, as it is shown."""
    return without_secrets(constants.ENDPOINT)


def has_token() -> bool:
    """Whether the client has a token to send. The token itself goes nowhere from here."""
    return get_token() is not None


def unreachable(timeout: float) -> str | None:
    """Why the Hub does not answer within ``timeout`` seconds; None if it does, whatever it says."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        httpx.head(constants.ENDPOINT, timeout=timeout)
    except httpx.HTTPError as error:
        return str(error) or type(error).__name__
    except OSError as error:  # it names no file, and looks for no other one
        return f"{error.strerror or error}; check SSL_CERT_FILE and SSL_CERT_DIR"
    except (httpx.InvalidURL, ValueError, ImportError) as error:
        return misconfigured(error) or f"the client cannot ask ({type(error).__name__})"
    return None
