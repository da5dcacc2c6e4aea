"""Two reports side by side: what becomes of each tap."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsv4_convert.cli import app
from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.changes import Became, Change, ReportedRun, changes
from dsv4_convert.parity.report.data import TapResult

from .synthetic import choice, empty, real, report


def _written(folder: Path, name: str, *taps: TapResult) -> Path:
    path = folder / name
    path.write_text(json.dumps(report(taps).to_json("")), encoding="utf-8")
    return path


def between(before: Path, after: Path) -> list[Change]:
    return changes(ReportedRun.read(before), ReportedRun.read(after))


def _tap(name: str, multiple: float, *, fails: bool = False) -> TapResult:
    verdict = Verdict.FAIL if fails else Verdict.PASS
    return real(f"layers.0.{name}", multiple, multiple, multiple, verdict=verdict)


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        (_tap("attn.q", 3.0), _tap("attn.q", 9e6, fails=True), Became.FAILS_NOW),
        (_tap("attn.q", 9e6, fails=True), _tap("attn.q", 3.0), Became.PASSES_NOW),
        (_tap("attn.q", 2.0), _tap("attn.q", 4.1), Became.WORSE),
        (_tap("attn.q", 4.1), _tap("attn.q", 2.0), Became.BETTER),
        (_tap("attn.q", 2.0), _tap("attn.q", 3.9), Became.SAME),
        (_tap("attn.q", 0.1), _tap("attn.q", 0.9), Became.SAME),
        (_tap("attn.q", 9e6, fails=True), _tap("attn.q", 8e6, fails=True), Became.SAME),
        (_tap("attn.q", 9e6, fails=True), _tap("attn.q", float("nan"), fails=True), Became.WORSE),
        (choice("layers.0.ffn.gate.experts", 0), choice("layers.0.ffn.gate.experts", 3), Became.SAME),
    ],
)
def test_a_change_has_its_kind(tmp_path: Path, before: TapResult, after: TapResult, kind: Became) -> None:
    (found,) = between(_written(tmp_path, "a.json", before), _written(tmp_path, "b.json", after))
    assert found.kind is kind


def test_taps_of_one_run_alone_are_named_the_worst_first(tmp_path: Path) -> None:
    before = _written(tmp_path, "a.json", _tap("attn.q", 1.0), _tap("attn.wkv", 2.0))
    after = _written(tmp_path, "b.json", _tap("attn.q", 1.0), _tap("attn.wo_b", 1.0), _tap("ffn", 9e6, fails=True))
    assert [(change.short, change.kind) for change in between(before, after)] == [
        ("ffn", Became.FAILS_NOW),
        ("attn.wkv", Became.GONE),
        ("attn.wo_b", Became.NEW),
        ("attn.q", Became.SAME),
    ]


def test_runs_of_two_dtypes_are_not_compared(tmp_path: Path) -> None:
    before = _written(tmp_path, "a.json", _tap("attn.q", 1.0))
    after = tmp_path / "b.json"
    after.write_text(before.read_text(encoding="utf-8").replace('"float32"', '"bfloat16"'), encoding="utf-8")
    with pytest.raises(UsageError, match=r"in float32, .* in bfloat16"):
        between(before, after)


def test_the_command_fails_for_what_fails_now(tmp_path: Path) -> None:
    good = _written(tmp_path, "good.json", _tap("attn.q", 2.0), _tap("attn.wkv", 2.0))
    bad = _written(tmp_path, "bad.json", _tap("attn.q", 9e6, fails=True), _tap("attn.wkv", 2.0))
    found = CliRunner().invoke(app, ["report", str(good), str(bad)])
    assert found.exit_code == 1
    assert "layers.0.attn.q" in found.stdout
    assert "attn.wkv" not in found.stdout
    assert "fails now: 1 tap, the same: 1 tap" in found.stdout
    back = CliRunner().invoke(app, ["report", str(bad), str(good), "--json", "-"])
    assert back.exit_code == 0
    assert json.loads(back.stdout)["counts"]["passes now"] == 1


@pytest.mark.parametrize(
    "taps", [(), (empty("layers.0.attn.compressor.norm"),), (real("layers.0.input", 0.0, 0.0, 0.0),)]
)
def test_a_run_that_compared_nothing_is_no_run(tmp_path: Path, taps: tuple[TapResult, ...]) -> None:
    good, nothing = _written(tmp_path, "good.json", _tap("attn.q", 1.0)), _written(tmp_path, "nothing.json", *taps)
    for pair in ((good, nothing), (nothing, good), (nothing, nothing)):
        with pytest.raises(BadInput, match=r"nothing\.json: a run that compared nothing"):
            between(*pair)


@pytest.mark.parametrize(
    ("field", "found", "says"),
    [
        ("mode", "Isolated", r"mode is 'Isolated', expected one of isolated, cumulative"),
        ("verdict", "passed", r"verdict is 'passed', expected one of pass, fail, tie, empty"),
    ],
)
def test_words_are_read_strictly(tmp_path: Path, field: str, found: str, says: str) -> None:
    path = _written(tmp_path, "a.json", _tap("attn.q", 1.0))
    document = json.loads(path.read_text(encoding="utf-8"))
    document["taps"][0][field] = found
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BadInput, match=says):
        between(path, path)


@pytest.mark.parametrize("damage", [{"schema_version": 1}, {"taps": {}}, {"taps": [{"name": "x"}]}, {"taps": [7]}])
def test_another_file_is_refused(tmp_path: Path, damage: dict[str, object]) -> None:
    path = _written(tmp_path, "a.json", _tap("attn.q", 1.0))
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | damage), encoding="utf-8")
    with pytest.raises(BadInput, match=r"a\.json: .*run that comparison again"):
        between(path, path)


class Page(HTMLParser):
    """The cells of a page's tables, row by row, and everything that it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.loads: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [
            value or "" for name, value in attrs if name in ("src", "href") and not (value or "").startswith("#")
        ]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self._inside = tag in ("td", "th") or (self._inside and tag == "wbr")

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data


def test_the_page_has_both_runs_side_by_side(tmp_path: Path) -> None:
    good = _written(tmp_path, "<b>good.json", _tap("attn.q", 2.0), _tap("attn.wkv", 2.0), _tap("ffn", 1.5))
    bad = _written(tmp_path, "bad.json", _tap("attn.q", 9e6, fails=True), _tap("attn.wkv", 8.0))
    out = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(good), str(bad), "--report", str(out)])
    assert result.exit_code == 1
    shown = Page(out.read_text(encoding="utf-8"))
    assert ["layers.0.attn.q", "isolated", "2.0", "✕ 9e6"] in shown.rows
    assert ["layers.0.attn.wkv", "isolated", "2.0", "8.0"] in shown.rows
    assert ["layers.0.ffn", "isolated", "1.5", "–"] in shown.rows
    assert ["0", "isolated", "2.0", "✕ 9e6", "attn.q", "attn.q"] in shown.rows
    assert ["report", str(good), str(bad)] in shown.rows
    assert shown.loads == []
    assert "Fails now: 1 tap" in out.read_text(encoding="utf-8")
    again = CliRunner().invoke(app, ["report", str(good), str(good), "--report", str(out)])
    assert again.exit_code == 0
    assert "NOT WORSE" in out.read_text(encoding="utf-8")
    refused = CliRunner().invoke(app, ["report", str(good), str(bad), "--report", str(tmp_path)])
    assert refused.exit_code == 2
