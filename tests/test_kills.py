"""Nothing half-done passes for whole: commands killed, failed and interrupted at a sample of their calls.

``python -m benchmarks.hostile kills`` does it at hundreds of calls of every command that writes.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kills import surroundings
from tests.kills.runs import REPOSITORY, Fault
from tests.kills.shim import Action, compiler
from tests.kills.subjects import CONVERSIONS, DOWNLOADS, EXPORTS, RECORDINGS, Subject, fresh
from tests.kills.sweep import Tally
from tests.kills.workshop import Workshop, workshop

pytestmark = pytest.mark.skipif(compiler() is None, reason="the shim needs Linux and a C compiler")


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop(reference=False) as made:
        yield made


@pytest.mark.parametrize(
    ("subject", "points"),
    [(CONVERSIONS[0], 6), (CONVERSIONS[-1], 3), (EXPORTS[0], 3), (DOWNLOADS[0], 3), (RECORDINGS[-1], 3)],
    ids=lambda value: value.name if isinstance(value, Subject) else "",
)
def test_a_sample_of_kills_faults_and_signals(shop: Workshop, subject: Subject, points: int) -> None:
    sweep = shop.sweep(subject)
    sites = sweep.sites()
    step = -(-len(sites) // points)
    asked = len(sweep.events) + 1 if subject.acceptor == "exported" else 2  # transformers is for the benchmark
    sweep.kill(sites[::step], acceptors=asked)
    sweep.fail(sites[step // 2 :: step])
    sweep.interrupt(sites[step // 3 :: 2 * step])
    sweep.two_at_once(len(sweep.events) * 2 // 3)
    assert sweep.tally.failures == []
    assert sweep.tally.counts["killed"] >= points - 1
    assert sweep.tally.counts["faults"] >= points - 1


def test_a_destination_that_grows_where_it_is_would_be_found(shop: Workshop) -> None:
    """The sweep itself: a download does not appear by a rename, which would not do for a conversion."""
    sweep = shop.sweep(dataclasses.replace(DOWNLOADS[0], name="planted", appears=True))
    sweep.kill(sweep.events[len(sweep.events) // 2 :][:1])
    assert sweep.tally.counts["half-done accepted"] == 1
    assert "something else than the whole is at the destination" in sweep.tally.failures[0]


def test_surroundings(shop: Workshop) -> None:
    tally = Tally("surroundings")
    surroundings.without_locks(shop, tally, CONVERSIONS[:1])
    surroundings.full_output(shop, tally)
    surroundings.interrupt_readers(shop, tally, 2, golden=False)
    assert tally.failures == []
    assert tally.counts["faults"] == 6


@pytest.mark.thorough
def test_small_disks_and_clocks(shop: Workshop) -> None:
    tally = Tally("surroundings")
    sample = (CONVERSIONS[0], EXPORTS[0], DOWNLOADS[0], RECORDINGS[-1])
    surroundings.skewed_clocks(shop, tally, sample)
    surroundings.small_disks(shop, tally, sample)
    surroundings.interrupt_twice(shop, tally, CONVERSIONS[0], 4)
    assert tally.failures == []


@pytest.mark.thorough
def test_a_quick_run_of_the_benchmark() -> None:
    from benchmarks.hostile.kills import run

    counts = run(quick=True)
    assert counts["failures"] == counts["half_done_accepted"] == 0
    assert counts["killed"] >= 20


#: Calls that strace shows, by the shim's names. The C library replaces some calls by others, which strace and the shim
#: count differently; these share one name.
_TRACED = {
    "openat": "open",
    "write": "write",
    "pwrite64": "write",
    "writev": "write",
    "fsync": "fsync",
    "fdatasync": "fsync",
    "ftruncate": "ftruncate",
    "rename": "rename",
    "renameat": "rename",
    "renameat2": "rename",
    "mkdir": "mkdir",
    "mkdirat": "mkdir",
    "unlink": "unlink",
    "unlinkat": "unlink",
    "rmdir": "unlink",
}


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not there")
@pytest.mark.thorough
def test_the_shim_misses_no_change_that_strace_sees(shop: Workshop, tmp_path: Path) -> None:
    """A whole conversion, Orbax and tensorstore included."""
    root = fresh(shop.folder / "traced")
    sweep = shop.sweep(CONVERSIONS[2])
    command = [sys.executable, "-m", "dsv4_convert", *map(str, CONVERSIONS[2].command(shop.inputs, root))]
    trace = tmp_path / "trace"
    options = ["strace", "-f", "-y", "-qq", "-s", "0", "-o", str(trace), "-e", f"trace={','.join(_TRACED)}"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    subprocess.run([*options, *command], check=True, capture_output=True, env=environment, cwd=root)
    seen = dict.fromkeys(_TRACED.values(), 0)
    for line in trace.read_text(encoding="utf-8", errors="replace").splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)", line)
        if call is None:
            continue
        # The folder that a path is not relative to says nothing.
        places = re.sub(r'AT_FDCWD<[^>]*>, (?="/)', "", call[2])
        if not re.search(rf'{re.escape(str(root))}[/">]', places):
            continue
        if call[1] == "openat" and not re.search(r"O_(WRONLY|RDWR|CREAT|TRUNC)", call[2]):
            continue
        seen[_TRACED[call[1]]] += 1
    met = dict.fromkeys(seen, 0)
    for event in sweep.events:
        name = {"rmdir": "unlink", "fopen": "open"}.get(event.call, event.call)
        met[name] += 1
    assert met == seen


def test_a_short_write_is_finished(shop: Workshop) -> None:
    """The system may write less than it was asked for."""
    sweep = shop.sweep(CONVERSIONS[0])
    writes = [event for event in sweep.sites() if event.call == "write" and "leaves" in event.place]
    root = fresh(shop.folder / "short")
    ended = shop.zygote.run(root, CONVERSIONS[0].command(shop.inputs, root), Fault(writes[-1].number, Action.SHORT))
    assert ended.code == 0
    assert CONVERSIONS[0].content(root) == sweep.whole
