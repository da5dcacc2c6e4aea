"""An object as a notebook shows it: a title, and facts in a table."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from dsv4_convert.show.text import for_html


def table(title: str, facts: Iterable[tuple[str, str]]) -> str:
    """HTML of a title and facts by name; both are text, never markup."""
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in facts)
    return f"<strong>{_text(title)}</strong><table>{rows}</table>"


def _text(text: str) -> str:
    return escape(for_html(text))
