"""Ctrl-C and SIGTERM, with real signals: exit code 130, soon, whatever the process is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "golden" / "data" / "tiny"

#: Programs for the main thread to run when the signal comes.
BUSY = {
    "Python": "while True: sum(range(1000))",
    "C code that lets other threads run, as XLA does": "ctypes.CDLL(None).sleep(60)",
    "a callback that loses exceptions": "[weakref.finalize(Victim(), spin) for _ in range(1)]; spin()",
    "cleaning up for ever": "try: spin()\n    finally:\n        while True: spin()",
    "a thread that nobody stops": "threading.Thread(target=ctypes.CDLL(None).sleep, args=(60,)).start(); spin()",
}

SCRIPT = """
import ctypes, sys, threading, time, weakref
from dsv4_convert.cli.interrupt import announce, interruptible
class Victim: pass
def spin():
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try: time.sleep(0.01)
        except KeyboardInterrupt:
            if {deaf}: continue
            raise
with interruptible():
    announce("interrupted; go on with the same command")
    print("ready", flush=True)
    {busy}
"""


def _interrupt(process: subprocess.Popen[str], number: int) -> tuple[int, str, float]:
    started = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    return process.returncode, err, time.monotonic() - started


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("busy", BUSY)
def test_the_process_ends_whatever_it_is_doing(busy: str, number: int) -> None:
    deaf = busy in ("a callback that loses exceptions", "cleaning up for ever")
    code = SCRIPT.format(busy=BUSY[busy], deaf=deaf)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    code_, err, seconds = _interrupt(process, number)
    assert code_ == 130
    assert err == "interrupted; go on with the same command\n"
    assert seconds < 20  # far from the 60 that it would sleep; a busy machine starts threads late


@pytest.mark.parametrize(
    "after",
    [0.2, 2.0, *(pytest.param(seconds / 2, marks=pytest.mark.thorough) for seconds in range(1, 24))],
)
def test_a_comparison_that_computes_is_interrupted(small: Path, after: float) -> None:
    """XLA's threads compile and compute; a shutdown of the interpreter among them would crash."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dsv4_convert", "parity", str(small), "--golden", str(GOLDEN), "--mode", "both"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
    )
    time.sleep(_started() + after)
    code, err, _ = _interrupt(process, signal.SIGINT)
    assert code in (130, 0)
    if code == 130:
        assert err.splitlines()[-1:] == ["interrupted"]
    assert "Segmentation" not in err
    assert "Exception ignored" not in err


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dsv4_convert.convert import hf_to_orbax
    from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint

    folder = tmp_path_factory.mktemp("interrupted")
    write_checkpoint(folder / "hf", tiny_config())
    hf_to_orbax(folder / "hf", folder / "orbax")
    return folder / "orbax"


def _started() -> float:
    """Seconds until the command has installed its handlers, on this machine and now."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import dsv4_convert.cli"], check=True, env=_environment())
    return time.monotonic() - started


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}
