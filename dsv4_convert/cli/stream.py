"""The tokens of one prompt, printed as they come."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import typer

from dsv4_convert.show.text import for_terminal

#: The text that a tokenizer gives for the beginning of a character.
_INCOMPLETE = "\ufffd"


class Stream:
    """Prints a text, or token ids between commas."""

    def __init__(self, words: Callable[[Sequence[int]], str] | None, before: str, *, err: bool) -> None:
        """
        Args:
            words: text of token ids; None to print the ids.
            before: what stands before the first token.
            err: print to stderr instead of stdout.
        """
        self._words, self._before, self._err = words, before, err
        self._tokens: list[int] = []
        self._printed = ""

    @property
    def is_terminal(self) -> bool:
        """Whether somebody watches."""
        return (sys.stderr if self._err else sys.stdout).isatty()

    def add(self, token: int) -> None:
        """Print the next token; a character of several tokens when it is complete."""
        if not self._tokens:
            self._write(self._before)
        self._tokens.append(token)
        text = ",".join(map(str, self._tokens)) if self._words is None else self._words(self._tokens)
        if not text.endswith(_INCOMPLETE) and text.startswith(self._printed):
            self._print(text)

    def end(self) -> None:
        """Print what is left, and the end of the line."""
        if not self._tokens:
            self._write(self._before)
        elif self._words is not None:
            self._print(self._words(self._tokens))
        typer.echo(err=self._err)

    def _print(self, text: str) -> None:
        self._write(text[len(self._printed) :])
        self._printed = text

    def _write(self, text: str) -> None:
        typer.echo(for_terminal(text), nl=False, err=self._err)
