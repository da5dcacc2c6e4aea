"""Runs of dsv4 commands under the shim: one prepared process, and a child of it for every run."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.kills.shim import Action, Scope, build

REPOSITORY = Path(__file__).resolve().parents[2]
_SEVERAL_SECONDS = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """A run that has ended.

    Attributes:
        code: exit code, or minus the signal that ended it.
        out, err: its standard output and standard error.
        seen: number of events that it met; 0 if it was killed.
        check: results of the acceptors before it began.
        left: threads and processes that outlived the command.
        seconds: wall time.
    """

    code: int
    out: str
    err: str
    seen: int
    check: list[str]
    left: list[str]
    seconds: float

    def __str__(self) -> str:
        return f"exit code {self.code}\n{self.out}{self.err}"


@dataclasses.dataclass(frozen=True)
class Fault:
    """An action at one event (counted from 1; 0 for none) of a kind, and refusals from the start.

    Attributes:
        file_size: the largest file that the run may write.
        stdout: file in place of the run's stdout.
    """

    at: int = 0
    action: Action = Action.NOTHING
    value: int = 0
    scope: Scope = Scope.CHANGES
    file_size: int | None = None
    stdout: str | None = None

    def __str__(self) -> str:
        what = f" {errno.errorcode.get(self.value)}" if self.action in (Action.FAIL, Action.FAIL_FROM) else ""
        what = f" {signal.Signals(self.value).name}" if self.action is Action.SIGNAL else what
        return f"{self.action.name}{what} at event {self.at}"


NONE = Fault()


class Zygote:
    """The prepared process. Made by :func:`zygote`."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._runs = 0

    def run(
        self,
        root: Path,
        arguments: Sequence[object] | None,
        fault: Fault = NONE,
        *,
        check: tuple[str, Sequence[object]] | None = None,
        log: Path | None = None,
        signals: Sequence[tuple[float, int]] = (),
        timeout: float = _SEVERAL_SECONDS,
    ) -> Ended:
        """Run one command to its end.

        Args:
            root: folder below which events count, and the working directory.
            arguments: of ``dsv4``; None for the check alone.
            fault: what it meets.
            check: a function of :mod:`.acceptors` and its arguments, called first.
            log: file for a line of each event.
            signals: (seconds from the start, signal).
            timeout: seconds after which it counts as hung.
        """
        request = self._request(root, arguments, fault, timeout)
        request |= {"do": "run", "signals": list(signals)}
        if check is not None:
            request["check"] = {"name": check[0], "arguments": [str(argument) for argument in check[1]]}
        if log is not None:
            request["log"] = str(log)
        return self._ended(request, self._ask(request))

    @contextmanager
    def held(self, root: Path, arguments: Sequence[object], at: int) -> Iterator[Held]:
        """A command that has stopped itself at an event; killed at the end of the block, unless it was ended."""
        fault = Fault(at, Action.SIGNAL, signal.SIGSTOP)
        request = {**self._request(root, arguments, fault, _SEVERAL_SECONDS), "do": "hold"}
        pid = self._ask(request)["pid"]
        assert pid is not None, f"{arguments}: ended before event {at}"
        held = Held(self, pid, request)
        try:
            yield held
        finally:
            if not held.ended:
                held.end(signal.SIGKILL)

    def _request(self, root: Path, arguments: Sequence[object] | None, fault: Fault, timeout: float) -> dict[str, Any]:
        self._runs += 1
        return {
            "root": str(root),
            "cwd": str(root),
            "arguments": None if arguments is None else [str(argument) for argument in arguments],
            "result": str(self._folder / f"run-{self._runs}"),
            "timeout": timeout,
            **dataclasses.asdict(fault),
        }

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return dict(json.loads(self._process.stdout.readline()))

    def _ended(self, request: dict[str, Any], answer: dict[str, Any]) -> Ended:
        result = request["result"]
        file = Path(f"{result}.json")
        said = json.loads(file.read_text(encoding="utf-8")) if file.exists() and file.stat().st_size else {}
        out, err = (Path(f"{result}.{name}") for name in ("out", "err"))
        texts = [path.read_text(encoding="utf-8", errors="replace") if path.exists() else "" for path in (out, err)]
        for path in (file, out, err):
            path.unlink(missing_ok=True)
        assert "broken" not in said, said["broken"]
        return Ended(
            code=answer["code"],
            out=texts[0],
            err=texts[1] + (f"\nhung for {answer['seconds']:.0f} s\n" if answer["hung"] else ""),
            seen=said.get("seen", 0),
            check=said.get("check", []),
            left=[*said.get("threads", []), *said.get("children", [])],
            seconds=answer["seconds"],
        )


@dataclasses.dataclass
class Held:
    """A stopped command."""

    zygote: Zygote
    pid: int
    request: dict[str, Any]
    ended: bool = False

    def end(self, how: int) -> Ended:
        """Let it go on (SIGCONT), or kill it; and wait for its end."""
        self.ended = True
        answer = self.zygote._ask({"do": "release", "pid": self.pid, "signal": int(how)})
        return self.zygote._ended(self.request, answer)


@contextmanager
def zygote(folder: Path, *, reference: bool = False, endpoint: str | None = None) -> Iterator[Zygote]:
    """Start a prepared process; ``folder`` is for its own files.

    Args:
        folder: exists, and is below no root of a run.
        reference: whether it imports what records a golden.
        endpoint: of the Hub that it talks to.
    """
    library = build(folder)
    settings: dict[str, Any] = {"reference": reference}
    if endpoint is not None:
        settings |= {"endpoint": endpoint, "hub_cache": str(folder)}
    # A command that is killed while it keeps a program would leave half of one to the other tests.
    unwanted = ("PROXY", "JAX_COMPILATION_CACHE_DIR")
    inherited = {
        name: value for name, value in os.environ.items() if not any(part in name.upper() for part in unwanted)
    }
    environment = inherited | {
        "LD_PRELOAD": str(library),
        "PYTHONPATH": str(REPOSITORY),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "0" if endpoint is not None else "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-m", "tests.kills.zygote", json.dumps(settings)]
    errors = folder / "zygote.err"
    with (
        errors.open("w", encoding="utf-8") as stream,
        subprocess.Popen(
            command,
            env=environment,
            cwd=REPOSITORY,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
        ) as process,
    ):
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert ready, errors.read_text(encoding="utf-8")
        try:
            yield Zygote(process, folder)
        finally:
            assert process.stdin is not None
            process.stdin.close()


def digests(folder: Path, *, leaving_out: str = "") -> dict[str, str]:
    """SHA-256 of every file below a folder by its path, and of every folder that it is one."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if leaving_out and name.startswith(leaving_out):
            continue
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found
