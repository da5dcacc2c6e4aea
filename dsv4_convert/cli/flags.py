"""Commands whose help fills the window, and shows no type for flags, which take no value."""

from __future__ import annotations

from inspect import cleandoc
from typing import Any

from typer.core import TyperCommand, TyperGroup


class _Flags:
    """Leaves out the type of flags."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters of the command, ``--help`` among them."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False) or getattr(param, "count", False):
                param.metavar = ""
        return params


def filled(text: str | None) -> str | None:
    """A text whose paragraphs are one line each, which the window breaks; the source breaks them elsewhere."""
    return None if text is None else "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


class Command(_Flags, TyperCommand):
    """A command."""

    def __init__(self, *arguments: Any, help: str | None = None, **options: Any) -> None:
        super().__init__(*arguments, help=filled(None if help is None else cleandoc(help)), **options)


class Group(_Flags, TyperGroup):
    """A group of commands."""
