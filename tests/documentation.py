"""Pages of the documentation as what they tell a reader to do: blocks, commands, and the output that they show."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from dsv4_convert.cli import app

#: Languages of blocks that are run, and of those that are only looked at: ``py`` is a fragment of a file.
RUN = ("console", "sh", "python")
LOOKED_AT = ("", "text", "json", "yaml", "toml", "py")

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`(dsv4 [^`\n]+)`(?!`)")
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
#: Lines of a plan that say what this machine can do: of them only the first word is compared.
_OF_THE_MACHINE = ("disk ", "memory ", "time ")
#: Lines of measurements that are all rounding, and the token where it is largest: their rest is another on any machine.
_ROUNDING = re.compile(r"^(\S+) .* pass$|^(\d+), \d+ .*$")
#: How much a shown measurement may be off. Counts, which have neither point nor exponent, must be equal.
_FACTOR = 5.0


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block: where it stands, its language, its text."""

    where: str
    language: str
    text: str


@dataclasses.dataclass(frozen=True)
class Command:
    """One command line and what the page shows that it prints; nothing where it shows nothing."""

    where: str
    words: tuple[str, ...]
    shown: str

    @property
    def line(self) -> str:
        return " ".join(self.words)

    @property
    def fails(self) -> bool:
        """Whether the page says that it exits with another code than 0."""
        return re.search(r"^(FAIL|error):", self.shown, re.MULTILINE) is not None


def blocks(page: Path, root: Path) -> list[Block]:
    """Every fenced block of a page."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        indent = len(match["indent"])
        lines = [line[indent:] for line in match["text"].splitlines()]
        language = (match["language"].split() or [""])[0]
        found.append(
            Block(f"{page.relative_to(root)}:{text.count(chr(10), 0, match.start()) + 1}", language, "\n".join(lines))
        )
    return found


def inline_commands(page: Path) -> Iterator[str]:
    """The commands that a page names in its text, such as `dsv4 verify CHECKPOINT`."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    yield from (match[1] for match in _INLINE.finditer(text))


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block of a shell, one after the other; those that && joins are several."""
    text = block.text.replace("\\\n", " ")
    lines = text.splitlines()
    if block.language == "console":
        starts = [index for index, line in enumerate(lines) if line.startswith("$ ")]
        assert starts[:1] == [0], f"{block.where}: a console block starts with a command, after '$ '"
    else:
        starts = list(range(len(lines)))
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        shown = "\n".join(lines[start + 1 : end]).strip("\n")
        words = shlex.split(lines[start].removeprefix("$ "), comments=True)
        while words:
            stop = words.index("&&") if "&&" in words else len(words)
            last = stop == len(words)
            yield Command(block.where, tuple(words[:stop]), shown if last else "")
            words = words[stop + 1 :]


def parse(words: tuple[str, ...]) -> str:
    """Parse ``dsv4 …`` without running it; returns the error, or an empty text."""
    command = typer.main.get_command(app)
    for leaf in leaves(command).values():
        leaf.callback = lambda **_: None
    try:
        command(list(words[1:]), prog_name="dsv4", standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # as errors of usage have it
            raise
        return str(error.format_message())
    return ""


def leaves(command: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every command by its words, groups resolved."""
    inner = getattr(command, "commands", None)
    if inner is None:
        return {path: command}
    return {key: leaf for name, each in inner.items() for key, leaf in leaves(each, (*path, name)).items()}


def unlike(shown: str, printed: str) -> str | None:
    """The first shown passage that was not printed; None if all were printed, in that order.

    ``…`` matches anything. Line breaks and spaces do not count, as the width of a terminal decides them. Numbers with
    a point or an exponent are measurements, and may be off by a factor.
    """
    rest = _flat(printed)
    for part in re.split(r"…", _flat(shown)):
        words = part.strip()
        if not words:
            continue
        found = _search(words, rest)
        if found is None:
            return words
        rest = rest[found:]
    return None


def _flat(text: str) -> str:
    """One line, in which what differs between healthy machines is left out."""
    lines, of_the_machine = [], False
    for line in text.splitlines():
        if not line.startswith(" "):  # or it goes on with the line before
            of_the_machine = line.startswith(_OF_THE_MACHINE)
            lines.append(line.split()[0] if of_the_machine and line else _ROUNDING.sub(r"\1", line.rstrip()))
        elif not of_the_machine:
            lines.append(line)
    return " ".join(" ".join(lines).split())


def _search(words: str, text: str) -> int | None:
    """End of the first passage of ``text`` that matches ``words``; None if there is none."""
    numbers = [match[0] for match in _NUMBER.finditer(words)]
    pattern = "".join(
        f"({_NUMBER.pattern})" if odd else re.escape(part)
        for odd, part in _alternating(_NUMBER.split(words), len(numbers))
    )
    for match in re.finditer(pattern, text):
        if all(_near(shown, found) for shown, found in zip(numbers, match.groups(), strict=True)):
            return match.end()
    return None


def _alternating(parts: list[str], numbers: int) -> Iterator[tuple[bool, str]]:
    for index, part in enumerate(parts):
        yield False, part
        if index < numbers:
            yield True, ""


def _near(shown: str, found: str) -> bool:
    if "." not in shown and "e" not in shown:
        return shown == found
    a, b = (float(text.replace(",", "")) for text in (shown, found))
    return a == b or (a * b > 0 and 1 / _FACTOR <= a / b <= _FACTOR) or max(abs(a), abs(b)) < 1e-9
