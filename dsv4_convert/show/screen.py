"""The console that everything is printed to: text is data, never markup, and no escape sequence of it gets through."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from dsv4_convert.show.text import for_terminal


class Screen(Console):
    """A console of rich without markup and emoji codes; styles come from ``Text`` and ``style=`` alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as a ``Text``; escaped before it is laid out, since rich drops some control characters."""
        return super().render_str(for_terminal(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render an object as rich does, its text escaped for a terminal."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=for_terminal(segment.text))
