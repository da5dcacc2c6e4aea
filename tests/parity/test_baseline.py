"""The gate: what a baseline lets pass, what it records, and when it refuses to."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dsv4_convert.golden as golden_package
from dsv4_convert.errors import BadInput, ResourceError, UsageError
from dsv4_convert.golden.archive import Golden, open_golden
from dsv4_convert.golden.noise import Mode
from dsv4_convert.parity.baseline import Baseline, BaselineKey, open_baseline, rounded, tightened
from dsv4_convert.parity.gate import BaselineRequest, baseline_request, gated
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.data import ParityReport, TapResult
from dsv4_convert.parity.report.words import verdict
from dsv4_convert.parity.run import ParityOptions, run_parity
from dsv4_convert.parity.tolerances import BANDS, BANDS_OF_FEW, LIMITS, UNIT
from dsv4_convert.spec.taps import TapKey

from .synthetic import choice, empty, real, report

DAY = datetime.date(2026, 11, 21)
Q, KV, CHOSEN = "layers.1.attn.q", "layers.1.attn.kv_norm", "layers.1.attn.indexer.chosen"
HEALTHY = (real(Q, 1.0, 2.0, 2.5), real(KV, 0.5, 1.2, 1.3), choice(CHOSEN, 8))


@pytest.fixture(scope="module")
def archive(golden: Path) -> Golden:
    """The committed golden, open."""
    return open_golden(golden)


@pytest.fixture
def judge(archive: Golden, tmp_path: Path) -> Callable[..., ParityReport]:
    """Judge a run by one file; with ``update`` or a ``reason`` the file is written."""

    def judged(
        taps: Sequence[TapResult],
        *,
        update: bool = False,
        reason: str | None = None,
        partial: bool = False,
        platform: dict[str, Any] | None = None,
        **options: Any,
    ) -> ParityReport:
        wanted = BaselineRequest(path=tmp_path / "b.json", update=update or reason is not None, reason=reason)
        return gated(report(taps, platform=platform, **options), archive, wanted, partial=partial, today=DAY)

    return judged


def test_a_run_passes_its_own_baseline_and_writes_the_same_bytes(
    judge: Callable[..., ParityReport], tmp_path: Path
) -> None:
    first = judge(HEALTHY, update=True)
    assert first.passed
    assert "3 taps added" in verdict(first)
    written = (tmp_path / "b.json").read_bytes()
    assert judge(HEALTHY).passed
    assert "No error has grown" in verdict(judge(HEALTHY))
    assert "nothing to change" in verdict(judge(HEALTHY, update=True))
    assert (tmp_path / "b.json").read_bytes() == written
    assert b'   "layers.1.attn.q": {"tap": 1.0, "row": 2.0, "element": 2.5}' in written  # a line of its own
    assert [entry.name for entry in tmp_path.iterdir()] == ["b.json"]  # nothing left beside it


@pytest.mark.parametrize("measure", ["tap", "row", "element"])
def test_an_error_beyond_its_band_fails_though_tolerance_lets_it_pass(
    judge: Callable[..., ParityReport], tmp_path: Path, measure: str
) -> None:
    judge(HEALTHY, update=True)
    old = {"tap": 1.0, "row": 2.0, "element": 2.5}
    for factor, passes in ((0.999, True), (1.001, False)):
        numbers = {**old, measure: factor * BANDS[measure].allowed(old[measure])}
        run = judge([real(Q, *numbers.values()), *HEALTHY[1:]])
        assert run.agrees
        assert run.passed is passes
    assert run.gate is not None
    assert [(grown.name, grown.measure) for grown in run.gate.grown] == [(Q, measure)]
    assert f"One tap has an error beyond its record: {Q} (queries after" in verdict(run)
    written = (tmp_path / "b.json").read_bytes()
    refused = judge([real(Q, *numbers.values()), *HEALTHY[1:]], update=True)
    assert not refused.passed
    assert "unless --reason says why" in verdict(refused)
    assert (tmp_path / "b.json").read_bytes() == written


def test_choices_have_a_band_too(judge: Callable[..., ParityReport]) -> None:
    judge(HEALTHY, update=True)
    assert judge([*HEALTHY[:2], choice(CHOSEN, 16)]).passed
    more = judge([*HEALTHY[:2], choice(CHOSEN, 17)])
    assert "5.7% of the tokens choose otherwise, where 2.7% are recorded" in verdict(more)


def test_a_reason_raises_and_is_kept(judge: Callable[..., ParityReport], tmp_path: Path) -> None:
    judge(HEALTHY, update=True)
    raised = judge([real(Q, 5.0, 6.1, 2.0), *HEALTHY[1:]], reason="three passes of bfloat16")
    assert raised.passed
    assert "1 tap raised (three passes of bfloat16)" in verdict(raised)
    document = json.loads((tmp_path / "b.json").read_text())
    assert document["measured"][0]["taps"][Q] == {"tap": 5.0, "row": 6.1, "element": 2.0}
    (entry,) = document["history"]
    assert (entry["date"], entry["reason"]) == ("2026-11-21", "three passes of bfloat16")
    assert entry["grown"] == [
        {
            "tap": Q,
            "from": {"tap": 1.0, "row": 2.0, "element": 2.5},
            "to": {"tap": 5.0, "row": 6.1, "element": 2.0},
        }
    ]
    assert entry["versions"]["jax"] == "0.10.2"
    # Smaller again: tightened, and the history stays. A reason that nothing needed is not kept.
    assert judge(HEALTHY, reason="none needed").passed
    document = json.loads((tmp_path / "b.json").read_text())
    assert document["measured"][0]["taps"][Q] == {"tap": 1.0, "row": 2.0, "element": 2.0}
    assert document["history"] == [entry]
    judge([real(Q, 4.0, 2.0, 2.0), *HEALTHY[1:]], reason="once more")
    history = json.loads((tmp_path / "b.json").read_text())["history"]
    assert [entry["reason"] for entry in history] == ["three passes of bfloat16", "once more"]


def test_other_platforms_are_left_alone(judge: Callable[..., ParityReport], tmp_path: Path) -> None:
    judge(HEALTHY, update=True)
    kept = json.loads((tmp_path / "b.json").read_text())["measured"]
    gpu = {"backend": "gpu", "device": "NVIDIA H200"}
    worse = [real(Q, 3.0, 7.0, 9.0), *HEALTHY[1:]]
    unknown = judge(worse, platform=gpu)
    assert not unknown.passed
    assert "no record of this: gpu NVIDIA H200, float32, isolated; --update-baseline adds it" in verdict(unknown)
    assert judge(worse, platform=gpu, update=True).passed
    document = json.loads((tmp_path / "b.json").read_text())
    assert [entry["platform"] for entry in document["measured"]] == ["cpu", "gpu NVIDIA H200"]
    assert document["measured"][:1] == kept


def test_what_only_one_side_has_does_not_pass_in_silence(judge: Callable[..., ParityReport]) -> None:
    judge(HEALTHY[:2], update=True)
    new = judge(HEALTHY)
    assert not new.passed
    assert f"1 tap has no record, the first of them {CHOSEN}; --update-baseline adds what is new" in verdict(new)
    absent = judge(HEALTHY[:1])
    assert not absent.passed
    assert f"1 recorded tap was not compared, the first of them {KV}" in verdict(absent)
    wanted = judge(HEALTHY[:1], partial=True)
    assert wanted.passed
    assert "1 tap, 1 recorded one was not wanted, and it has no record of 158 other taps" in verdict(wanted)
    assert judge([*HEALTHY[:2], empty("layers.1.attn.compressor.pooled")]).passed


def test_what_fails_is_never_recorded(judge: Callable[..., ParityReport], tmp_path: Path) -> None:
    failing = judge([real(Q, 1.0, 40.0, 2.0, verdict=Verdict.FAIL)], reason="it is fine")
    assert not failing.passed
    assert "b.json is unchanged: only what is within tolerance is recorded" in verdict(failing)
    assert not judge([], update=True).passed
    assert not (tmp_path / "b.json").exists()


def test_a_run_that_does_not_reach_everything_is_not_recorded(
    judge: Callable[..., ParityReport], tmp_path: Path
) -> None:
    lacking = {"missed": ["no block is complete"], "require_coverage": True}
    first = judge(HEALTHY, update=True, **lacking)
    assert not first.passed
    assert not (tmp_path / "b.json").exists()
    said = verdict(first)
    assert said.endswith("b.json is unchanged, since only a run that reaches and compares everything is recorded.")
    assert "--update-baseline adds" not in said
    judge(HEALTHY, update=True)
    written = (tmp_path / "b.json").read_bytes()
    worse = judge([real(Q, 5.0, 6.1, 2.0), *HEALTHY[1:]], reason="why not", **lacking)
    assert (tmp_path / "b.json").read_bytes() == written
    assert "--reason" not in verdict(worse)
    assert "is unchanged" in verdict(judge(HEALTHY[:1], update=True))


multiples = st.floats(0, 12) | st.sampled_from([0.0, 1e-9, 0.999, 9.99, 9.995])


@given(multiples)
def test_numbers_are_rounded_up_to_three_digits_once(value: float) -> None:
    once = rounded(value)
    assert value <= once <= value * 1.01 + 1e-320
    assert float(f"{once:.3g}") == once
    assert rounded(once) == once


@given(st.lists(st.tuples(multiples, multiples, multiples), min_size=1, max_size=6))
def test_tightening_is_monotone_and_a_run_twice_changes_nothing(runs: list[tuple[float, float, float]]) -> None:
    measured = [dict(zip(("tap", "row", "element"), run, strict=True)) for run in runs]
    record = {measure: rounded(number) for measure, number in measured[0].items()}
    for run in measured:
        tighter = tightened(record, run)
        assert all(tighter[measure] <= record[measure] for measure in record)
        assert tightened(tighter, run) == tighter
        record = tighter
    # The order of runs does not matter.
    assert record == {measure: rounded(min(run[measure] for run in measured)) for measure in record}


@given(st.dictionaries(st.sampled_from([Q, KV, "logits", "layers.0.ffn"]), st.tuples(multiples, multiples, multiples)))
def test_a_file_says_what_was_written(numbers: dict[str, tuple[float, float, float]]) -> None:
    digest = "a" * 64
    where = BaselineKey("cpu", "float32", "isolated", "all")
    taps = {name: dict(zip(("tap", "row", "element"), values, strict=True)) for name, values in numbers.items()}
    by_key = {TapKey.parse(name): values for name, values in taps.items()}
    text = Baseline(digest, {}).with_taps(where, by_key).to_text()
    document = json.loads(text)
    assert document["measured"][0]["taps"] == taps
    assert Baseline(digest, {where: dict(reversed(by_key.items()))}).to_text() == text


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=2), "schema_version is 2, this version of dsv4 reads 1"),
        (lambda d: d.update(golden="b" * 64), "measured with the golden whose digest is 'bbb"),
        (lambda d: d.update(extra=1), "expected the entries"),
        (lambda d: d["measured"][0].update(mode="both"), "mode is 'both', expected one of isolated, cumulative"),
        (lambda d: d["measured"].append(d["measured"][0]), "two entries of the same platform"),
        (lambda d: d["measured"][0]["taps"].update({"layers.1.attn.qq": {"tokens": 0}}), "the golden has no tap"),
        (lambda d: d["measured"][0]["taps"][Q].update(tap=-1.0), "tap is -1.0, expected a number that is 0 or more"),
        (lambda d: d["measured"][0]["taps"][Q].update(row=1e9), "row is 1000000000.0, beyond the tolerance of 24"),
        (lambda d: d["measured"][0]["taps"][CHOSEN].update(tokens=1.5), "tokens is 1.5, beyond the tolerance of 1"),
        (lambda d: d["measured"][0]["taps"][Q].update(tap=True), "tap is True"),
        (lambda d: d["measured"][0]["taps"][Q].pop("row"), "expected tap, row, element or tokens"),
        (lambda d: d["measured"][0]["taps"][Q].update(tap=math.nan), "NaN is not a JSON number"),
        (lambda d: d["measured"][0]["taps"][Q].update(tap=math.inf), "Infinity is not a JSON number"),
        (lambda d: d.update(measured={}), "expected a list"),
    ],
)
def test_a_file_that_no_run_wrote_is_refused(
    judge: Callable[..., ParityReport], tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    judge(HEALTHY, update=True)
    _edit(tmp_path / "b.json", change)
    with pytest.raises(BadInput, match=r"b\.json") as refused:
        judge(HEALTHY, update=True)
    assert message in str(refused.value)


def test_a_number_too_large_for_a_float_is_refused(judge: Callable[..., ParityReport], tmp_path: Path) -> None:
    judge(HEALTHY, update=True)
    text = (tmp_path / "b.json").read_text().replace('{"tap": 1.0', '{"tap": 1e999')
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(BadInput, match="is beyond float64"):
        judge(HEALTHY)


def test_files_that_are_not_there_or_cannot_be_written(archive: Golden, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such baseline; record one with --update-baseline"):
        open_baseline(tmp_path / "none.json", archive)
    (tmp_path / "file").write_text("")
    wanted = BaselineRequest(path=tmp_path / "file" / "b.json", update=True)
    with pytest.raises(ResourceError, match=r"b\.json: cannot write: "):
        gated(report(HEALTHY), archive, wanted, partial=False)
    for options in ({"update": True, "reason": None}, {"update": False, "reason": "why"}):
        with pytest.raises(UsageError, match="--update-baseline"):
            baseline_request(None, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a few words"):
        baseline_request(tmp_path / "b.json", update=True, reason=" ")


def test_what_could_not_be_recorded_is_refused_before_the_run(tiny: Path, golden: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    wanted = BaselineRequest(path=tmp_path / "deep" / "b.json", update=True)
    absent = dataclasses.replace(wanted, path=tmp_path / "file" / "b.json")
    with patch("dsv4_convert.parity.run.ParityRun", side_effect=AssertionError("it is refused before the run")):
        with pytest.raises(ResourceError, match=r"b\.json: the baseline cannot be written \(.*file is no folder\)"):
            run_parity(None, golden, source=tiny, baseline=absent)
        with (
            patch("os.access", return_value=False),
            pytest.raises(ResourceError, match=r"b\.json: the baseline cannot be written \(no permission in "),
        ):
            run_parity(None, golden, source=tiny, baseline=wanted)
        with pytest.raises(UsageError, match="expected --precision highest, found default"):
            run_parity(None, golden, ParityOptions(precision="default"), source=tiny, baseline=wanted)
        with pytest.raises(AssertionError, match="before the run"):  # whose folder is made when it is written
            run_parity(None, golden, source=tiny, baseline=wanted)


def test_the_modes_have_records_of_their_own(judge: Callable[..., ParityReport]) -> None:
    both = [*HEALTHY, *(dataclasses.replace(tap, mode=Mode.CUMULATIVE) for tap in HEALTHY)]
    judge(HEALTHY, update=True)
    assert "3 taps have no record" in verdict(judge(both))
    judge(both, update=True)
    worse = judge([*both[:3], real(Q, 3.0, 2.0, 2.5, mode=Mode.CUMULATIVE), *both[4:]])
    assert worse.gate is not None
    assert [(grown.name, grown.mode) for grown in worse.gate.grown] == [(Q, Mode.CUMULATIVE)]
    assert "3 taps, 3 recorded ones were not wanted" in verdict(judge(HEALTHY))
    elsewhere = {"backend": "gpu", "device": "NVIDIA H200"}
    judge(HEALTHY, update=True, platform=elsewhere)
    assert "not wanted" not in verdict(judge(HEALTHY, platform=elsewhere))


@pytest.mark.parametrize("name", ["tiny", "tiny-v4.1"])
def test_what_passes_the_gate_is_within_the_limits(name: str) -> None:
    """The committed goldens, in both dtypes. ``python -m benchmarks.gate`` shows that other machines pass it."""
    file = Path(golden_package.__file__).parent / "data" / f"{name}.baseline.json"
    measured = json.loads(file.read_text(encoding="utf-8"))["measured"]
    assert {entry["dtype"] for entry in measured} == set(UNIT)
    for entry in measured:
        for tap, numbers in entry["taps"].items():
            for measure in ("tap", "row", "element"):
                bands = (BANDS[measure], BANDS_OF_FEW[measure]) if measure in numbers else ()
                allowed = max((band.allowed(numbers[measure]) for band in bands), default=0.0)
                assert allowed <= getattr(LIMITS[entry["dtype"]], measure), (tap, measure)
