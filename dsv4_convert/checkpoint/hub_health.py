"""Whether the Hub client of this machine can do its work: its folder, its token, the way to the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, get_token
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

from dsv4_convert.urls import without_secrets


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


def misconfigured(error: BaseException) -> str | None:
    """What in the environment keeps the client from asking at all; None where ``error`` is something else.

    No value is quoted, as the URLs of proxies hold passwords.
    """
    if isinstance(error, httpx.InvalidURL):
        return "HF_ENDPOINT, or the proxy in HTTPS_PROXY or ALL_PROXY, is not a URL"
    if type(error) is ValueError and "proxy" in str(error):
        return "the proxy in HTTPS_PROXY or ALL_PROXY is of a kind that the client does not know"
    if isinstance(error, ImportError) and "socksio" in str(error):
        return "the SOCKS proxy in HTTPS_PROXY or ALL_PROXY needs the package socksio, which is not installed"
    return None
