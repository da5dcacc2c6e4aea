"""Do the readers withstand damaged files? Hundreds of thousands of them, guided by code coverage.

Every reader of ``tests/fuzzing/readers.py`` runs in a process of its own under atheris, which keeps an input that
reaches new code and goes on from it; the mutations know JSON and safetensors headers. A finding is any exception but
dsv4's own, a message that a terminal cannot print, something accepted that the bytes do not say, an execution of more
than 10 seconds, or 1 GiB of memory. Without atheris, the benchmark mutates only the seeds, and its output says so.

Run: nox -s fuzz, or python -m benchmarks.hostile damage [--quick] [--executions N] [--reader NAME ...] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

EXECUTIONS, QUICK = 1_000_000, 20_000
SECONDS_PER_EXECUTION = 10
MEMORY = 1 << 30
#: Longer than any seed; a longer file says nothing more about a reader.
_MAX_BYTES = 64 << 10
#: Whose branches lead the search.
_INSTRUMENTED = (
    *("checkpoint", "config", "convert.sources", "convert.to_hf", "store.arrays", "store.layout", "store.manifest"),
    *("store.journal", "files.strict_json"),
)
_DONE = re.compile(r"^#\d+\s+(INITED|DONE)\s+cov: (\d+) ft: (\d+) corp: (\d+)", re.MULTILINE)


def has_atheris() -> bool:
    """Whether the search can be led by coverage."""
    return importlib.util.find_spec("atheris") is not None


def fuzz(executions: int, names: Sequence[str] = (), keep: Path | None = None) -> dict[str, int]:
    """Share ``executions`` among readers, those of ``names`` or all, one on each core.

    ``keep``: where inputs that fail are put.
    """
    from tests.fuzzing.readers import READERS

    chosen = {name: reader for name, reader in READERS.items() if not names or name in names}
    how = "led by coverage (atheris)" if has_atheris() else "atheris is not installed: mutations of the seeds alone"
    print(f"{executions:,} executions over {len(chosen)} readers, {how}", flush=True)
    shares = sum(1 / reader.cost for reader in chosen.values())
    counts = {"readers": len(chosen), "executions": 0, "failures": 0}

    def one(name: str) -> tuple[int, int]:
        wanted = max(1, round(executions / chosen[name].cost / shares))
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_memory_folder()) as work:
            return _reader(name, wanted, Path(work), keep)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a process
        for done, failures in pool.map(one, chosen):
            counts["executions"] += done
            counts["failures"] += failures
    return counts


def _memory_folder() -> str | None:
    """Some readers want a file, which is quicker there."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _reader(name: str, wanted: int, work: Path, keep: Path | None) -> tuple[int, int]:
    """One reader in its process: executions and failures."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.hostile", "damage", "--worker", str(work), "--reader", name]
    process = subprocess.run([*command, "--executions", str(wanted)], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    findings = [json.loads(file.read_bytes()) for file in sorted(work.glob("finding-*.json"))]
    if process.returncode:  # it did not come to its end: a hang, too much memory, or a crash of the interpreter
        tail = process.stderr.strip().splitlines()[-12:]
        ends = [file.read_bytes().hex() for kind in ("timeout", "oom", "crash") for file in work.glob(f"{kind}-*")]
        findings.append({"what": f"exit code {process.returncode}: {' | '.join(tail)}", "data": "".join(ends[:1])})
    report = json.loads(file.read_bytes()) if (file := work / "report.json").exists() else {"done": 0, "accepted": 0}
    coverage = {kind: int(branches) for kind, branches, _, _ in _DONE.findall(process.stderr)}
    covered = f", coverage {coverage['INITED']} -> {coverage['DONE']}" if len(coverage) == 2 else ""
    lines = [
        f"{name:24} {report['done']:9,} executions, {report['accepted']:9,} accepted{covered}, slowest "
        f"{report.get('slowest', 0):.2f} s, {report.get('memory', 0) / 2**20:.0f} MiB, {seconds:.0f} s, "
        f"{len(findings)} findings"
    ]
    for number, finding in enumerate(findings):
        lines += [f"  FAILURE {name}: {finding['what']}", f"    bytes: {bytes.fromhex(finding['data'])[:400]!r}"]
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{name.replace(' ', '-')}-{number}").write_bytes(bytes.fromhex(finding["data"]))
    print("\n".join(lines), flush=True)  # at once, as readers run side by side
    return report["done"], len(findings)


# --- In the process of one reader -------------------------------------------------------------------------------------


class _Counted:
    """The harness, counting; a finding is written down once and does not end the search."""

    def __init__(self, name: str, work: Path) -> None:
        from tests.fuzzing import readers

        self._read: Callable[[bytes, Path], bool] = lambda data, at: readers.accepts(readers.READERS[name], data, at)
        self._work, self._files = work, work / "files"
        self._files.mkdir()
        self._seen: set[str] = set()
        self.done = self.accepted = 0
        self.slowest = 0.0

    def __call__(self, data: bytes) -> None:
        begun = time.perf_counter()
        try:
            self.accepted += self._read(data, self._files)
        except Exception as error:
            self._found(error, data)
        self.done += 1
        self.slowest = max(self.slowest, time.perf_counter() - begun)

    def _found(self, error: Exception, data: bytes) -> None:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
        places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(own[-3:]))
        key = f"{type(error).__name__} {places}"
        if key not in self._seen:
            self._seen.add(key)
            finding = {"what": f"{key}: {str(error)[:300]!a}", "data": data.hex()}
            (self._work / f"finding-{len(self._seen):03}.json").write_text(json.dumps(finding))

    def report(self) -> None:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        report = {"done": self.done, "accepted": self.accepted, "slowest": self.slowest, "memory": memory}
        (self._work / "report.json").write_text(json.dumps(report))


def _worker(name: str, wanted: int, work: Path) -> None:
    if not has_atheris():
        _unled(name, wanted, work)
        return
    import atheris

    with atheris.instrument_imports(include=[*(f"dsv4_convert.{name}" for name in _INSTRUMENTED), "golden"]):
        counted = _Counted(name, work)
    from tests.fuzzing.mutation import mutate
    from tests.fuzzing.readers import READERS

    seeds = READERS[name].seeds()

    def damaged(data: bytes, limit: int, seed: int) -> bytes:
        random = Random(seed)
        which = random.random()
        if which < 0.3:
            return bytes(atheris.Mutate(data, limit))
        # From a seed again now and then: what is accepted is one step from it.
        return mutate(random.choice(seeds) if which < 0.5 else data, random)[:limit]

    def execute(data: bytes) -> None:
        counted(data)
        if counted.done >= wanted:  # libFuzzer ends the process without another word to Python
            counted.report()

    arguments = [
        sys.argv[0],
        f"-runs={wanted}",
        f"-timeout={SECONDS_PER_EXECUTION}",
        f"-rss_limit_mb={MEMORY >> 20}",
        f"-max_len={_MAX_BYTES}",
        "-len_control=0",
        "-seed=1",
        f"-artifact_prefix={work}/",
        str(_corpus(name, work)),
    ]
    atheris.Setup(arguments, execute, custom_mutator=damaged)
    atheris.Fuzz()


def _corpus(name: str, work: Path) -> Path:
    from tests.fuzzing.readers import READERS

    folder = work / "corpus"
    folder.mkdir()
    for number, seed in enumerate(READERS[name].seeds()):
        (folder / f"seed-{number}").write_bytes(seed)
    return folder


def _unled(name: str, wanted: int, work: Path) -> None:
    """Mutations of the seeds, without knowing what they reach."""
    from tests.fuzzing.mutation import mutate
    from tests.fuzzing.readers import READERS

    def too_slow(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS_PER_EXECUTION} seconds")

    signal.signal(signal.SIGALRM, too_slow)
    seeds, random, counted = READERS[name].seeds(), Random(1), _Counted(name, work)
    for _ in range(wanted):
        data = mutate(random.choice(seeds), random)[:_MAX_BYTES]
        signal.alarm(SECONDS_PER_EXECUTION)
        counted(data)
        signal.alarm(0)
    counted.report()
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > MEMORY:
        raise SystemExit(f"more than {MEMORY >> 20} MiB")


def main(arguments: list[str]) -> None:
    """Fuzz, print a line for each reader and the counts as JSON; exit code 1 with findings."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.hostile damage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK:,} executions")
    parser.add_argument("--executions", type=int, help=f"over all readers; {EXECUTIONS:,} if not given")
    parser.add_argument("--reader", action="append", default=[], help="only this one; may be repeated")
    parser.add_argument("--keep", type=Path, help="folder for the inputs that fail")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker is not None:
        _worker(options.reader[0], options.executions, options.worker)
        return
    executions = options.executions or (QUICK if options.quick else EXECUTIONS)
    counts = fuzz(executions, options.reader, options.keep)
    print(json.dumps(counts))
    raise SystemExit(bool(counts["failures"]))
