"""Goldens, checkpoints and inspections in a notebook: text, never markup."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from dsv4_convert import Weights, hf_to_orbax, inspect, open_golden
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.show.notebook import table

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "tiny"


class Shown(HTMLParser):
    """The words of a page, and its elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words = ""
        self.elements: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.elements.add(tag)

    def handle_data(self, data: str) -> None:
        self.words += f"{data} "


@pytest.fixture(scope="module")
def orbax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("notebook")
    write_checkpoint(folder / "hf", tiny_config())
    hf_to_orbax(folder / "hf", folder / "<b>orbax", layers=[0, 2])
    return folder / "<b>orbax"


def test_what_is_shown(orbax: Path) -> None:
    expected = [
        (Weights.open(orbax), ("Converted checkpoint", "<b>orbax", "bfloat16", "0, 2 of 4")),
        (open_golden(GOLDEN), ("Golden", "transformers", "1 x 300", "0-3", "float32, bfloat16")),
        (inspect(orbax), ("Orbax checkpoint of dsv4", "<b>orbax", "routed experts")),
    ]
    for thing, words in expected:
        shown = Shown(thing._repr_html_())  # type: ignore[attr-defined]
        assert shown.elements == {"strong", "table", "tr", "th", "td"}
        for word in words:
            assert word in shown.words, word


def test_nothing_is_markup() -> None:
    shown = Shown(table("<script>a", [("<i>", "\x1b[31m&amp;")]))
    assert not shown.elements & {"script", "i"}
    assert "&amp;" in shown.words
    assert "\x1b" not in shown.words
