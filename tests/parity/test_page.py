"""The page of a report: whole, safe to open and to pass on, and of the report's own numbers."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import re
import shlex
import stat
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import patch
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from dsv4_convert.cli import app
from dsv4_convert.cli.destination import check_destination, write_text
from dsv4_convert.errors import ResourceError, UsageError
from dsv4_convert.golden.archive import TapForm, open_golden
from dsv4_convert.golden.compact import Compact
from dsv4_convert.golden.noise import MODES, Mode
from dsv4_convert.golden.shrink import shrink
from dsv4_convert.parity.choices import Flips
from dsv4_convert.parity.detail import EDGES, POINTS, ComparedPart, Detail
from dsv4_convert.parity.floor import floor_of
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.data import Gate, GrownError, ParityReport, TapInMode
from dsv4_convert.parity.report.html.data import SHOWN, page_data
from dsv4_convert.parity.report.html.marks import short
from dsv4_convert.parity.report.html.page import RunInfo, page
from dsv4_convert.parity.report.html.scale import Scale
from dsv4_convert.parity.report.words import next_steps, verdict
from dsv4_convert.parity.run import ParityOptions, ParityRun
from dsv4_convert.parity.tolerances import LIMITS
from dsv4_convert.show.urls import without_secrets
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.taps import TapKey, is_state, taps_of
from dsv4_convert.weights.published import PublishedWeights

from .faults.fault import Held
from .synthetic import choice, empty, real
from .synthetic import report as synthetic

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
RUN = RunInfo(
    words=("dsv4", "parity", "./orbax", "--golden", "./golden", "--report", "x.html"),
    date=datetime.datetime(2026, 9, 1, tzinfo=datetime.UTC),
)
SECTIONS = ["next", "depth", "taps", "tokens", "failing", "choices", "logits", "reach", "provenance"]
HOSTILE = "</script><img src=x onerror=alert(1)><!--{{ 7 * 7 }}\u2028'\""
EXPERTS, EXPERT, LAYER = "layers.3.ffn.experts.w2", 3, 3
VOID = {"meta", "br", "img", "wbr", "hr", "input", "link"}


@pytest.fixture(scope="module")
def held(tiny: Path) -> Held:
    """The demo's weights, one expert of the last layer wrong."""
    held = Held.read_from(PublishedWeights.open(tiny))
    held.arrays[EXPERTS] = held.arrays[EXPERTS].copy()
    held.arrays[EXPERTS][EXPERT] *= -1
    return held


@pytest.fixture(scope="module")
def report(held: Held, golden: Path) -> ParityReport:
    """A failing run in both modes, with what pictures need."""
    return ParityRun(held, open_golden(golden), ParityOptions(modes=MODES, detail=True)).run()


@pytest.fixture(scope="module")
def text(report: ParityReport) -> str:
    return page(report, RUN)


class _Page(HTMLParser):
    """The content of a page. Fails if an element is closed that is not open, or never closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def having(self, attribute: str) -> list[str]:
        return [
            value or "" for _, attributes in self.elements for name, value in attributes.items() if name == attribute
        ]


def _embedded(text: str) -> dict[str, Any]:
    (content,) = re.findall(r'<script type="application/json" id="dsv4-parity">(.*?)</script>', text, re.DOTALL)
    return json.loads(content)


def test_the_page_is_whole_and_needs_nothing_else(text: str) -> None:
    parsed = _Page(text)
    tags = [tag for tag, _ in parsed.elements]
    assert [attributes["id"] for tag, attributes in parsed.elements if tag == "section"] == SECTIONS
    ids = parsed.having("id")
    assert len(ids) == len(set(ids)), "ids are unique across all figures"
    links = [link for link in parsed.having("href") if not link.startswith("data:image/png;base64,")]
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    assert not {"img", "link", "iframe", "object", "base"} & set(tags)
    assert tags.count("script") == 2, "our own few lines, and the data, which do not run"
    assert not parsed.having("src")
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
    assert not re.search(r"@import|url\((?!#)|https?:|javascript:", text)
    assert {name for label in parsed.having("aria-labelledby") for name in label.split()} <= set(ids)
    assert len(text) < 1.5e6
    assert "prefers-color-scheme: dark" in text


def test_figures_are_text_in_the_colours_of_the_theme(text: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    drawn = [figure for figure in figures if "aria-hidden" not in figure]
    # Both modes over depth, what was added, through the layer; four maps; two of the failing tap in each... and logits.
    assert len(drawn) >= 12
    for figure in drawn:
        root = ElementTree.fromstring(figure)  # by a parser of XML, which forgives nothing
        assert [child.tag for child in root][:2] == ["title", "desc"]
        assert all(child.text for child in list(root)[:2])
        assert root.findall(".//text") or "map" in figure
        assert "var(--soft)" in figure
        assert not re.search(r"#0\d0\d0\d|DejaVu|fill: #|stroke: #", figure), "no colour of its own"


def test_the_data_are_the_reports(report: ParityReport, text: str) -> None:
    data = _embedded(text)
    whole = json.loads(json.dumps(report.to_json(verdict(report))))
    assert data["report"].keys() == whole.keys()
    for shown, tap in zip(data["report"]["taps"], whole["taps"], strict=True):
        assert shown.keys() == {key for key, value in tap.items() if value not in (None, "")}
        assert (shown["name"], shown["verdict"], shown["mode"]) == (tap["name"], tap["verdict"], tap["mode"])
        if tap["distance"] is not None:
            noise, worst = shown["distance"].pop("noise"), shown["distance"].pop("worst")
            assert noise == pytest.approx(tap["distance"].pop("noise"), rel=1e-5)
            assert worst == tap["distance"].pop("worst")
            assert shown["distance"] == pytest.approx(tap["distance"], rel=1e-5)
    assert data["command"] == RUN.command
    assert data["figures"]["divergences"][1]["kl"]
    assert report.logits is not None
    assert max(data["figures"]["divergences"][1]["kl"]) == pytest.approx(report.logits.kl_max, rel=1e-3)
    line = next(line for line in data["figures"]["depth"][0]["lines"] if line["tap"] == "ffn")
    results = {tap.name: tap for tap in report.taps if tap.mode is Mode.ISOLATED}
    assert line["multiples"] == [results[f"layers.{layer}.ffn"].distance.noise.largest for layer in range(4)]
    assert line["failing"] == [LAYER]
    assert data["figures"]["depth"][0]["first"] == LAYER


def test_errors_by_token_are_those_that_are_judged(report: ParityReport, golden: Path) -> None:
    """Summarised again they give the report's own largest row and element; and the wrong expert's tokens are wrong."""
    assert report.detail is not None
    for (mode, layer), errors in report.detail.tokens.items():
        taps = [tap for tap in report.taps if (tap.mode, tap.layer) == (mode, layer)]
        largest = {tap.short: max(tap.distance.noise.row, tap.distance.noise.element) for tap in taps if tap.distance}
        judged = [value for short, value in largest.items() if not is_state(short)]
        assert float(np.nanmax(errors.worst)) == pytest.approx(max(judged), rel=1e-6)
        if layer is not None:
            assert float(np.nanmax(errors.streams)) == pytest.approx(largest["hc_ffn.streams"], rel=1e-6)
    sent = (open_golden(golden).read(f"layers.{LAYER}.ffn.gate.experts") == EXPERT).any(axis=-1)
    wrong = report.detail.tokens[Mode.ISOLATED, LAYER].streams > report.limits.row
    assert 0 < sent.sum() < sent.size
    np.testing.assert_array_equal(wrong, sent)


def test_a_sample_holds_every_element_in_a_bin_and_the_worst_first(report: ParityReport) -> None:
    assert report.detail is not None
    samples = report.detail.samples
    assert [(sample.mode, str(sample.key)) for sample in samples] == [
        (Mode.ISOLATED, f"layers.{LAYER}.ffn.experts"),
        (Mode.CUMULATIVE, f"layers.{LAYER}.ffn.experts"),
        (Mode.CUMULATIVE, "hc_head.pre"),
    ]
    for sample in samples:
        result = next(tap for tap in report.taps if (tap.key, tap.mode) == (sample.key, sample.mode))
        assert result.distance is not None
        assert sample.elements == math.prod(result.shape)
        assert sample.multiples[0] == sample.multiples.max() == pytest.approx(result.distance.noise.element)
        assert (sample.found[0], sample.golden[0]) == (result.distance.found, result.distance.golden)
        assert len(sample.multiples) == min(POINTS, sample.elements)
    # No element of another token is far off; of those that the wrong expert computed most are.
    result = next(tap for tap in report.taps if tap.key == samples[0].key)
    far = int(samples[0].counts[np.searchsorted(EDGES, 1000) :].sum())
    assert result.distance is not None
    assert 0.9 < far / (result.distance.rows_outside * result.shape[-1]) <= 1


def test_entries_stand_at_the_last_token_of_their_block(golden: Path) -> None:
    recorded = open_golden(golden)
    detail = Detail(recorded, LIMITS["float32"])
    name = "layers.1.attn.compressor.entries"
    value = recorded.read(name)
    floor = floor_of(np.ones(value.shape[:2]), np.ones((2, *value.shape[:2])), 2.0**-24)
    found = value.copy()
    found[0, 5] += 100
    detail.add(
        TapKey.parse(name), Mode.ISOLATED, [ComparedPart(found, value, floor, None, TapForm.WHOLE)], failing=None
    )
    worst = detail.tokens[Mode.ISOLATED, 1].worst[0]
    ratio = recorded.config.csa_ratio
    assert np.flatnonzero(worst > 50).tolist() == [6 * ratio - 1]
    assert np.flatnonzero(~np.isnan(worst)).tolist() == list(range(ratio - 1, 300, ratio))


def test_hostile_text_stays_text(report: ParityReport) -> None:
    hostile = dataclasses.replace(
        report,
        detail=None,  # pictures hold no text of others
        checkpoint={"path": HOSTILE, "source": {HOSTILE: HOSTILE}, "storage": "x"},
        localizations=tuple(
            dataclasses.replace(localization, damaged=(HOSTILE,), weights=(HOSTILE,))
            for localization in report.localizations
        ),
    )
    text = page(hostile, dataclasses.replace(RUN, words=("dsv4", HOSTILE)), lambda token: f"{token} {HOSTILE}")
    parsed = _Page(text)
    tags = [tag for tag, _ in parsed.elements]
    assert "img" not in tags
    assert tags.count("script") == 2
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
    assert sum("<img src=x" in word for word in parsed.words) > 5, "it can be read"
    assert _embedded(text)["command"] == shlex.join(["dsv4", HOSTILE])
    assert _embedded(text)["report"]["checkpoint"]["path"] == HOSTILE


def test_the_same_report_gives_the_same_bytes(report: ParityReport, text: str) -> None:
    with patch.dict(os.environ, {"SOURCE_DATE_EPOCH": "1"}):
        assert page(report, RUN) == text


def test_what_is_zero_or_no_number_has_its_place(report: ParityReport) -> None:
    """Infinite errors in one layer, no error in the next; NaN in the logits."""
    assert report.detail is not None

    def changed(tap: Any) -> Any:
        if tap.name == "layers.3.ffn.gate.experts":
            flips = Flips(tokens=10, of=300, ties=4, margin=1.0, noise=math.inf, worst=(0, 7))
            return dataclasses.replace(tap, verdict=Verdict.FAIL, reason="6 tokens choose otherwise", flips=flips)
        if tap.distance is None or tap.layer not in (1, 2):
            return tap
        value = math.inf if tap.layer == 1 else 0.0
        noise = dataclasses.replace(tap.distance.noise, tap=value, row=value, element=value)
        outcome = Verdict.FAIL if tap.layer == 1 else Verdict.PASS
        return dataclasses.replace(tap, verdict=outcome, distance=dataclasses.replace(tap.distance, noise=noise))

    detail = Detail.__new__(Detail)
    detail.prompt = report.detail.prompt
    detail.tokens = {at: type(e)(e.streams * 0, e.worst * math.inf) for at, e in report.detail.tokens.items()}
    detail.samples = [
        dataclasses.replace(sample, infinite=7, exact=0, counts=sample.counts * 0, found=sample.found * math.nan)
        for sample in report.detail.samples
    ]
    nan = [dataclasses.replace(position, kl=math.nan) for position in report.detail.positions[Mode.ISOLATED]]
    detail.positions = {Mode.ISOLATED: nan, Mode.CUMULATIVE: [dataclasses.replace(p, kl=0.0) for p in nan]}
    growth = tuple(
        dataclasses.replace(layer, added=math.nan, total=math.inf, inherited=0.0) for layer in report.error_splits
    )
    strange = dataclasses.replace(report, taps=tuple(map(changed, report.taps)), error_splits=growth, detail=detail)
    text = page(strange, RUN)
    _Page(text)
    assert ">✕ ∞</a></td>" in text
    assert '290 of 300</td>\n      <td class="number">4</td><td class="number">6</td><td class="number">∞</td>' in text
    figures = _embedded(text)["figures"]
    assert figures["divergences"][0]["kl"][0] == "nan"
    assert {cell for map_ in figures["maps"] for row in map_["multiples"] for cell in row} == {0.0, "inf"}


def test_a_run_that_passes_shows_the_layer_closest_to_a_limit() -> None:
    """Which is not the one with the largest number: limits differ."""
    limits = LIMITS["float32"]
    over_the_tap = real("layers.0.attn.q", *[0.9 * limits.tap] * 3)
    at_a_row = real("layers.1.attn.q", 1.0, 0.7 * limits.row, 1.0)
    course = page_data(synthetic([over_the_tap, at_a_row])).course
    assert at_a_row.distance is not None
    assert over_the_tap.distance is not None
    assert at_a_row.distance.noise.largest > over_the_tap.distance.noise.largest
    assert course is not None
    assert course.where == "layer 0"


def test_ties_of_a_choice_have_a_number_and_what_is_empty_has_none() -> None:
    taps = [choice("layers.0.ffn.gate.experts", 3), empty("layers.0.attn.compressor.entries")]
    course = page_data(synthetic(taps)).course
    assert course is not None
    assert (course.taps, course.multiples) == (("ffn.gate.experts",), (0.5,))


def _deep(layers: int, modes: tuple[Mode, ...], failing: int) -> ParityReport:
    """A run of V4-Pro's first layers; from layer ``failing`` on everything fails."""
    pro = Config.from_file(CONFIGS / "DeepSeek-V4-Pro.json")
    return synthetic(
        [
            real(
                f"layers.{layer}.{tap.name}",
                *[3.2170123456789e4 if layer >= failing else 1.2345678912345] * 3,
                mode=mode,
                verdict=Verdict.FAIL if layer >= failing else Verdict.PASS,
            )
            for mode in modes
            for layer in range(layers)
            for tap in taps_of(pro, layer)
        ]
    )


def test_a_deep_model_shows_the_layers_that_fail_and_stays_small() -> None:
    report = _deep(61, MODES, failing=0)
    text = page(report, RUN)
    parsed = _Page(text)
    assert len(text.encode()) < 3e6
    opened = [
        attributes for tag, attributes in parsed.elements if tag == "details" and attributes.get("class") == "tap"
    ]
    assert len(opened) == SHOWN
    assert [("open" in attributes) for attributes in opened[:3]] == [True, False, False]
    assert f"{report.count(Verdict.FAIL) - SHOWN} more fail" in text
    assert 'class="folded"' not in text, "there is no layer that passes"
    text = page(_deep(61, MODES, failing=20), RUN)
    assert text.count('class="folded"') == 2
    assert "show the 20 layers that pass" in text
    assert 'class="folded"' not in page(_deep(61, MODES, failing=61), RUN), "where nothing fails nothing is hidden"


def test_a_failing_tap_has_a_link_and_the_command_that_looks_at_it(text: str) -> None:
    parsed = _Page(text)
    assert f"#layers.{LAYER}.ffn.experts" in parsed.having("href")
    assert f"layers.{LAYER}.ffn.experts" in parsed.having("id")
    assert f"layers.{LAYER}.ffn.experts.cumulative" in parsed.having("id")
    run = dataclasses.replace(RUN, words=(*RUN.words, "--layer=1", "--mode", "both", "--json", "-"))
    tap = real("layers.3.ffn.experts", 1, 1, 1)
    command = "dsv4 parity ./orbax --golden ./golden --mode both --layer 3 --taps ffn.experts -vv"
    assert run.of_tap(tap) == command
    model = real("hc_head.pre", 1, 1, 1)
    assert run.of_tap(model) == command.replace("--layer 3 --taps ffn.experts", "--taps hc_head.pre")


def test_scales_hold_everything() -> None:
    scale = Scale.over([0.0, 3e-9, 2e7, math.inf, math.nan], least=(0.5, 48))
    bottom, top = scale.ends
    places = [scale(value) for value in (0.0, 3e-9, 1.0, 2e7, math.inf)]
    assert [bottom, *places, top] == sorted({bottom, *places, top}), "each in its own place, in order"
    assert scale(math.nan) == scale(math.inf)
    assert [short(value) for value in (0, 0.25, 2.84, 9.96, 140.4, 999.6, 1.4e7, 3e-4, math.nan)] == [
        "0", "0.2", "2.8", "10", "140", "1e3", "1e7", "3e-4", "∞",
    ]  # fmt: skip


def test_other_runs_have_pages_too(report: ParityReport, held: Held, golden: Path, tmp_path: Path) -> None:
    """Compact goldens, nothing at all, no detail, a run that passes."""
    compact = shrink(open_golden(golden), tmp_path / "compact", Compact.of([0, 128, -1], 300))
    small = ParityRun(held, compact, ParityOptions(layers=[LAYER], detail=True)).run()
    assert small.detail is not None
    assert not np.isnan(small.detail.tokens[Mode.CUMULATIVE, LAYER].streams).any(), "of every token there is a sketch"
    text = page(small, RUN)
    assert "All that is computed before it agrees" in text
    _Page(text)
    passing = dataclasses.replace(
        report,
        taps=tuple(tap for tap in report.taps if tap.mode is Mode.ISOLATED and tap.layer == 1),
        modes=(Mode.ISOLATED,),
        localizations=(),
        other_weights=(),
        detail=None,
    )
    text = page(passing, RUN)
    assert "<title>PASS" in text
    assert 'id="failing"' not in text
    assert "No error is known token by token" in text
    empty = dataclasses.replace(passing, taps=(), error_splits=(), prompt_coverage=(), layers=(), logits=None)
    text = page(empty, RUN)
    assert "Nothing was compared" in _Page(text).words.__str__()
    assert "<title>FAIL" in text


def test_a_baseline_that_is_not_passed_is_shown_with_what_to_do() -> None:
    q, kv, gone = "layers.1.attn.q", "layers.1.attn.kv_norm", "layers.1.attn.wkv"
    grown = GrownError(key=TapKey.parse(q), mode=Mode.ISOLATED, measure="row", recorded=2.0, allowed=3.0, found=4.5)
    gate = Gate(
        path=f"b{HOSTILE}.json",
        platforms=("cpu, float32, isolated",),
        compared=2,
        grown=(grown,),
        unrecorded=(TapInMode(key=TapKey.parse(kv), mode=Mode.ISOLATED),),
        missing=(TapInMode(key=TapKey.parse(gone), mode=Mode.ISOLATED),),
        left_out=0,
    )
    run = dataclasses.replace(synthetic([real(q, 1, 4.5, 2), real(kv, 1, 2, 2)]), gate=gate)
    parsed = _Page(page(run, RUN))
    assert "baseline" in parsed.having("id")
    assert "#baseline" in parsed.having("href")
    words = " ".join(parsed.words)
    for shown in (
        "2.00x",
        "3.00x",
        "4.50x",
        "one tap has an error beyond its record",
        f"{gone}, isolated",
        f"{kv}, isolated",
    ):
        assert shown in words
    grown_step, reason, missing, unrecorded = next_steps(run)
    assert f"Find what made `{q}` less exact" in grown_step
    assert "--reason WHY" in reason
    assert gone in missing
    assert unrecorded.endswith("--update-baseline`.")
    imprecise = dataclasses.replace(run, platform={**run.platform, "precision": "default"})
    assert next_steps(imprecise)[0].startswith("Repeat with `--precision highest`")
    raised = dataclasses.replace(gate, missing=(), unrecorded=(), update=True, updated=True, reason="other hardware")
    text = page(dataclasses.replace(run, gate=raised), RUN)
    assert "<h3>Raised</h3>" in text
    assert "1 tap raised (other hardware)" in text
    assert 'id="baseline"' not in page(dataclasses.replace(run, gate=None), RUN)
    lacking = synthetic([real(q, 1, 2, 2)], missed=["no block is complete"], require_coverage=True)
    assert next_steps(lacking) == [step for step in next_steps(lacking) if "golden with more tokens" in step]


def test_urls_lose_their_secrets(report: ParityReport) -> None:
    url = "https://user:secret@host/golden?X-Amz-Signature=secret"
    assert without_secrets(f"{url} --report x.html") == "https://…@host/golden?… --report x.html"
    assert without_secrets("'s3://me:p@ss:w@rd@host/a@b#token=x' ./a@b#c") == "'s3://…@host/a@b#…' ./a@b#c"
    assert without_secrets("hf://datasets/x/y@main/golden") == "hf://datasets/x/y@main/golden"
    bare = dataclasses.replace(report, golden={**report.golden, "path": url}, taps=(), error_splits=(), detail=None)
    text = page(bare, dataclasses.replace(RUN, words=("dsv4", "parity", ".", "--golden", url, "--report", "x.html")))
    assert "secret" not in text
    assert text.count("https://…@host/golden?…") == 6, "three times to be read, three times in the data"


def test_the_command_writes_it(tiny: Path, golden: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    arguments = ["parity", "--source", str(tiny), "--golden", str(golden), "--layer", "0"]
    result = CliRunner().invoke(app, [*arguments, "--report", str(target)])
    assert result.exit_code == 0, result.output
    text = target.read_text(encoding="utf-8")
    assert _embedded(text)["report"]["sentence"].startswith("PASS")
    assert "tokens</dt><dd>300" in text
    with patch("dsv4_convert.parity.run.run_parity", side_effect=AssertionError("it is refused before the run")):
        for place in (tmp_path / "nowhere" / "x.html", tmp_path):
            refused = CliRunner().invoke(app, [*arguments, "--report", str(place)])
            assert refused.exit_code == 2
            assert "cannot be written" in refused.output


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "x.html"
    write_text("--report", target, "old")
    target.chmod(0o640)
    with (
        patch("os.replace", side_effect=OSError(28, "No space left on device")),
        pytest.raises(ResourceError, match="No space"),  # of the disk, where what was asked for was right
    ):
        write_text("--report", target, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["x.html"]
    assert target.read_text() == "old"
    link = tmp_path / "link.html"
    link.symlink_to(target)
    write_text("--report", link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    write_text("--json", "/dev/null", "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    check_destination("--report", None)
    with patch("os.access", return_value=False), pytest.raises(UsageError, match="no permission"):
        check_destination("--report", target)
