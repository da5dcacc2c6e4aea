"""Text from outside, through every output of every command: nothing obeys it, and nothing of it is lost."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Callable
from contextlib import ExitStack
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer, models

import dsv4_convert.parity.report.html
from dsv4_convert.errors import BadInput
from dsv4_convert.show.screen import Screen
from dsv4_convert.show.text import (
    for_html,
    for_json,
    for_markdown,
    for_markdown_code,
    for_terminal,
    for_xml,
    workflow_command,
)

from .bad_inputs.case import Bench, Outcome, Place, invoke
from .bad_inputs.edit import manifest_again
from .bad_inputs.goldens import golden_manifest

#: Unicode's control and format characters, halves of pairs, and ends of lines and paragraphs.
UNSAFE = tuple(
    chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp")
)
KEPT = "\n\t\u200c\u200d"
#: Markup of rich, links and colours of terminals, reversed text, commands of GitHub, and what markdown and HTML obey.
MARKUP = (
    "[/]",
    "[red]colour[/red]",
    "[link=https://evil.example]here[/link]",
    ":boom:",
    "\x1b]8;;https://evil.example\x1b\\here\x1b]8;;\x1b\\",
    "\x1b[31mred\x1b[0m",
    "\x9b2J",
    "\u202egnp.exe\u202c",
    "::error title=forged::message",
    "##[error]forged",
    "<script>forged()</script>",
    "<img src=x onerror=forged()>",
    "| `cell` | [a](https://evil.example) ![b](https://evil.example) *c* $d$ |",
    "]]></testsuite>",
    "50% %0A",
    "\n::error::forged",
    "\r::warning::forged",
)
#: All of it at once; lone surrogates cannot be in JSON, and no name of a file has a slash.
EVERYTHING = "".join(c for c in UNSAFE if unicodedata.category(c) != "Cs") + " ".join(MARKUP)
_OURS = r"(?!::notice title=|::error title=)"
_OBEYED = re.compile(rf"^{_OURS}(?:\s*::[a-z-]+.*?::|.*##\[)", re.MULTILINE)


def unsafe(text: str) -> set[str]:
    """Characters of a text that an output must not have."""
    return {c for c in set(text) - set(KEPT) if c in UNSAFE}


def harmless(text: str) -> None:
    """No character that is obeyed, and no line that GitHub takes for a command but our own two."""
    assert not unsafe(text), sorted(map(ascii, unsafe(text)))[:5]
    assert not _OBEYED.search(text), _OBEYED.search(text)


_FUNCTIONS: tuple[Callable[[str], str], ...] = (for_terminal, for_xml, for_markdown, for_markdown_code)


@pytest.mark.parametrize("escape", _FUNCTIONS, ids=lambda function: function.__name__)
@given(text=st.lists(st.one_of(st.sampled_from(UNSAFE), st.sampled_from(MARKUP), st.text()), max_size=6).map("".join))
def test_nothing_unsafe_is_left(escape: Callable[[str], str], text: str) -> None:
    harmless(escape(text))


@given(text=st.text(st.characters(categories=("L", "N", "P", "S", "M", "Zs")), max_size=30))
def test_other_text_stays_as_it_is(text: str) -> None:
    """Letters of all scripts, emoji and punctuation; but for the rare text that is a command to GitHub."""
    if "##" not in text and "::" not in text:
        assert for_terminal(text) == for_html(text) == text
        assert for_json(json.dumps(text, ensure_ascii=False)) == json.dumps(text, ensure_ascii=False)


@given(value=st.recursive(st.text() | st.sampled_from(MARKUP + UNSAFE), lambda inner: st.lists(inner, max_size=3)))
def test_json_says_the_same(value: Any) -> None:
    escaped = for_json(json.dumps(value, ensure_ascii=False, indent=1))
    harmless(escaped)
    assert json.loads(escaped) == value


def test_every_unsafe_character_is_shown() -> None:
    for character in UNSAFE:
        if character not in KEPT:
            assert for_terminal(f"a{character}b") == f"a{ascii(character)[1:-1]}b" == for_html(f"a{character}b")


def test_a_console_takes_text_and_no_markup() -> None:
    """However text comes to it: as a string, as a Text, in the cell or the header of a table."""
    out = StringIO()
    screen = Screen(file=out, width=10_000_000, force_terminal=False)
    table = Table(EVERYTHING)
    table.add_row(EVERYTHING)
    screen.print(EVERYTHING, Text(EVERYTHING), table)
    harmless(out.getvalue())
    for shown in ("[red]colour[/red]", ":boom:", "\\x1b[31m", "\\u202egnp"):
        assert out.getvalue().count(shown) == 4, shown


def test_a_command_is_one_line_and_undone_to_what_it_says() -> None:
    line = workflow_command("error", EVERYTHING, EVERYTHING)
    assert len(line.splitlines()) == 1
    harmless(line)
    assert line.startswith("::error title=")


# --- Commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A golden, a checkpoint and a tokenizer whose every free text is hostile, in folders of hostile names."""
    bench = Bench(tmp_path_factory.mktemp("text"))
    root = bench.root / f"in {EVERYTHING[1:30]}[red]::error a::b\u202e".replace("/", "").replace("\n", "")
    root.mkdir()
    made = Place(bench, root, "tiny", ExitStack())
    golden_manifest(_hostile_golden)(made)
    manifest_again(made.orbax, _hostile_conversion)
    words = {f"{number} {EVERYTHING}": number for number in range(96)}
    Tokenizer(models.WordLevel(words, unk_token=next(iter(words)))).save(str(root / "tokenizer.json"))
    return made


def _hostile_golden(document: dict[str, Any]) -> None:
    document["reference"].update(
        name=EVERYTHING, attention_implementation=EVERYTHING, versions={EVERYTHING: EVERYTHING}
    )
    document["source"].update(name=EVERYTHING, revision=EVERYTHING, files={EVERYTHING: "0" * 64})


def _hostile_conversion(document: dict[str, Any]) -> None:
    document["metadata"].update(source={"name": EVERYTHING, "revision": EVERYTHING}, dsv4_version=EVERYTHING)
    document["metadata"]["tensors"]["dropped"] = {EVERYTHING: 3}


def _run(place: Place, *words: str, code: int = 0) -> Outcome:
    outcome = invoke(place.words(words))
    assert outcome.code == code, outcome.text[-2000:]
    harmless(outcome.out)
    harmless(outcome.err)
    return outcome


@pytest.mark.parametrize("json_to", [(), ("--json", "-")], ids=["text", "json"])
@pytest.mark.parametrize(
    "words",
    [
        ("golden", "show", "{golden}"),
        ("golden", "verify", "{golden}"),
        ("golden", "diff", "{golden}", "golden/data/tiny"),
        ("inspect", "{golden}"),
        ("inspect", "{orbax}"),
        ("verify", "{orbax}"),
        ("generate", "{orbax}", "--tokens", "1,2", "-n", "2", "--tokenizer", "{root}"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_what_is_looked_at(place: Place, words: tuple[str, ...], json_to: tuple[str, ...]) -> None:
    outcome = _run(place, *words, *json_to)
    if words[0] in ("inspect", "generate") or words[1] in ("show", "diff"):
        assert "[red]colour[/red]" in outcome.out  # shown, and not taken for a colour
    if json_to:
        json.loads(outcome.out)


class _Tags(HTMLParser):
    """The tags of a page, and the attributes that run something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [tag, *(name for name, _ in attrs if name.startswith("on"))]


@pytest.mark.parametrize("verbosity", [(), ("-v",), ("--explain",)], ids=["verdict", "tables", "words"])
@pytest.mark.parametrize("layer", ["0", "all"])
def test_a_report(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verbosity: tuple[str, ...], layer: str
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    files = {name: str(tmp_path / f"report.{name}") for name in ("json", "junit", "report")}
    options = [word for name, file in files.items() for word in (f"--{name}", file)]
    _run(place, "parity", "{orbax}", "--golden", "{golden}", "--layer", layer, "--tokenizer", "{root}", "--github",
         *verbosity, *options)  # fmt: skip
    written = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.iterdir()}
    assert len(written) == 4
    page = written.pop("report.report")
    assert not unsafe(page)
    for text in written.values():
        harmless(text)
    json.loads(written["report.json"])
    ET.fromstring(written["report.junit"])
    tags = _Tags()
    tags.feed(page)
    assert not {"img", "onerror"} & set(tags.found)
    assert tags.found.count("script") == _scripts()


def _scripts() -> int:
    """The scripts of the template."""
    template = Path(dsv4_convert.parity.report.html.__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    return len(re.findall(r"<script\b", template))


@pytest.mark.parametrize("hostile", MARKUP, ids=ascii)
def test_errors(place: Place, hostile: str, tmp_path: Path) -> None:
    """A message quotes a name of a file, a value of a manifest, a word of the command line."""
    name = hostile.replace("/", "").replace("\0", "")
    _run(place, "inspect", f"{{root}}/{name}", code=3)
    _run(place, "golden", "show", f"{tmp_path}/{name}", code=3)
    _run(place, "parity", "{orbax}", "--golden", "{golden}", "--taps", hostile, code=2)
    _run(place, "parity", "{orbax}", "--golden", "{golden}", "--layer", hostile, code=2)
    saved = {"schema_version": 3, "taps": [{"name": hostile, "mode": hostile, "verdict": hostile, "distance": None}]}
    (tmp_path / "report.json").write_text(json.dumps(saved))
    _run(place, "report", f"{tmp_path}/report.json", f"{tmp_path}/report.json", code=3)
    harmless(str(BadInput(f"config.json: {hostile}")))


def test_a_message_shows_what_a_name_hides() -> None:
    assert str(BadInput("unknown keys: chunk_\tdigests, a\u200db\nsee café")) == (
        "unknown keys: chunk_\\tdigests, a\\u200db\nsee café"
    )
