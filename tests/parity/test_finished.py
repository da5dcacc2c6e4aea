"""Runs that are interrupted go on at their layer, and report what an uninterrupted run reports."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4_convert.convert import hf_to_orbax
from dsv4_convert.errors import BadInput, ResourceError, UsageError
from dsv4_convert.golden.noise import MODES, Mode
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.parity import finished
from dsv4_convert.parity.finished import Findings, FinishedSteps
from dsv4_convert.parity.report.data import ParityReport
from dsv4_convert.parity.report.html.page import RunInfo, page
from dsv4_convert.parity.run import ParityOptions, run_parity
from dsv4_convert.spec.taps import TapKey
from dsv4_convert.store import Processes

from ..cli.samples import samples
from .test_run import planted

ROOT = Path(__file__).parents[2]
NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
#: Everything that a report can hold: both modes, both programs, numbers for figures.
WHOLE = ParityOptions(modes=MODES, detail=True)
BFLOAT16 = ParityOptions(modes=[Mode.ISOLATED], dtype="bfloat16", programs=["streamed"])  # type: ignore[list-item]


class Interrupted(Exception):
    """Raised in place of a signal."""


@pytest.fixture(scope="module")
def faulty(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a fault, so that a layer is localized and failing taps keep samples."""
    return planted(plain, tmp_path_factory.mktemp("faulty") / "orbax", "layers.1.attn.wo_a", lambda a: a[::-1])


@pytest.fixture(scope="module")
def whole(faulty: Path, golden: Path) -> ParityReport:
    return run_parity(faulty, golden, WHOLE)


def everything(report: ParityReport) -> tuple[Any, str]:
    """The report as data and as a page."""
    return report.to_json(""), page(report, RunInfo(words=(), date=NOW))


def resumed(checkpoint: Path, golden: Path, options: ParityOptions, folder: Path, *, steps: int) -> ParityReport:
    """Interrupt a run at a step, and go on with another."""
    left = steps

    def progress(done: int, total: int, what: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Interrupted

    with pytest.raises(Interrupted), FinishedSteps(folder) as state:
        run_parity(checkpoint, golden, dataclasses.replace(options, state=state), progress=progress)
    assert folder.is_dir()
    seen: list[str] = []
    with FinishedSteps(folder) as state:
        again = dataclasses.replace(options, state=state)
        report = run_parity(checkpoint, golden, again, progress=lambda done, total, what: seen.append(what))
        state.clear()
    assert not folder.exists()
    assert len(seen) == 2 * 6 - steps if options is WHOLE else seen
    return report


@pytest.mark.parametrize("steps", [2, 8])
def test_the_report_is_that_of_an_uninterrupted_run(
    faulty: Path, golden: Path, whole: ParityReport, tmp_path: Path, steps: int
) -> None:
    report = resumed(faulty, golden, WHOLE, tmp_path / "state", steps=steps)
    assert everything(report) == everything(whole)
    assert report.localizations
    assert report.detail is not None
    assert report.detail.samples


def test_measures_of_single_operations_are_kept(faulty: Path, golden: Path, tmp_path: Path) -> None:
    report = resumed(faulty, golden, BFLOAT16, tmp_path / "state", steps=3)
    assert everything(report) == everything(run_parity(faulty, golden, BFLOAT16))
    assert any(tap.systematic is not None for tap in report.taps)


def test_every_value_of_a_report_comes_back() -> None:
    """Infinities and all members of unions too; a field that was forgotten would not be equal."""
    known = {
        np.ndarray[Any, Any]: np.array([1.5, np.nan]),
        TapKey: TapKey.parse("layers.3.attn.q"),
        float: float("inf"),
    }
    for value in samples(Findings, known):
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        text = json.dumps(finished._packed(value, arrays), allow_nan=False)
        back = finished._unpacked(Findings, json.loads(text), arrays)
        assert repr(back) == repr(value)


def test_a_real_kill(faulty: Path, golden: Path, tmp_path: Path) -> None:
    """One program suffices, since the processes compile anew."""
    out, state = tmp_path / "report.json", tmp_path / "state"
    whole = run_parity(faulty, golden, ParityOptions(programs=["streamed"]))  # type: ignore[list-item]
    words = ["parity", faulty, "--golden", golden, "--program", "streamed", "--json", out, "--state", state]
    command = [sys.executable, "-m", "dsv4_convert", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (state / "streamed-00002.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    found, expected = json.loads(out.read_text()), json.loads(json.dumps(whole.to_json("")))
    assert {**found, "sentence": ""} == expected
    assert {entry.name for entry in tmp_path.iterdir()} == {"report.json"}


def begun(checkpoint: Path, golden: Path, folder: Path) -> None:
    """A run that ended after two steps."""
    options = ParityOptions(layers=[0], programs=["streamed"])  # type: ignore[list-item]
    with FinishedSteps(folder) as state:
        run_parity(checkpoint, golden, dataclasses.replace(options, state=state))


def test_a_run_of_something_else_is_refused(plain: Path, golden: Path, tmp_path: Path, faulty: Path) -> None:
    begun(plain, golden, tmp_path / "state")
    same = ParityOptions(layers=[0], programs=["streamed"])  # type: ignore[list-item]

    def refused(checkpoint: Path, why: str, **changes: Any) -> None:
        with FinishedSteps(tmp_path / "state") as state, pytest.raises(UsageError, match=why) as caught:
            run_parity(checkpoint, golden, dataclasses.replace(same, state=state, **changes))
        assert "an unfinished parity run with other settings" in str(caught.value)
        assert "remove that folder" in str(caught.value)

    refused(plain, r"layers: \[0\] then, \[0, 1\] now", layers=[0, 1])
    refused(plain, r"precision: 'highest' then, 'high' now", precision="high")
    refused(plain, r"programs: ", programs=None)
    refused(faulty, r"checkpoint: ")
    write_checkpoint(tmp_path / "hf", tiny_config(), seed=1)
    hf_to_orbax(tmp_path / "hf", tmp_path / "other")
    shutil.rmtree(tmp_path / "hf")
    refused(tmp_path / "other", r"checkpoint: ")


def test_a_folder_that_cannot_be_taken_up(plain: Path, golden: Path, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    begun(plain, golden, folder)
    file = folder / "streamed-00000.safetensors"
    content = bytearray(file.read_bytes())
    at = content.index(b"layers.0.attn.q")
    content[at + 9 : at + 13] = b"ATTN"
    file.write_bytes(content)
    with pytest.raises(BadInput, match=r"streamed-00000.*changed or damaged; remove .* to begin again"):
        begun(plain, golden, folder)
    (folder / "request.json").unlink()  # as a run leaves it that is killed at its very end
    begun(plain, golden, folder)
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"files that this command did not write(.|\n)*mine\.txt"):
        begun(plain, golden, folder)
    with FinishedSteps(tmp_path / "other"), pytest.raises(ResourceError, match="another process"):
        FinishedSteps(tmp_path / "other").__enter__()
    with FinishedSteps(tmp_path / "other") as state, pytest.raises(UsageError, match="of one process"):
        run_parity(plain, golden, ParityOptions(state=state), processes=Processes(0, 2))
