"""A process that has imported everything and has one thread; for every request a child of it runs one dsv4 command.

The child is a fork, so that a run costs what the command costs and not its imports, and so that hundreds of them may be
killed. Requests are lines of JSON on stdin, answers on stdout; :mod:`tests.kills.runs` is the other side.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import resource
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tests.kills import acceptors
from tests.kills.shim import Shim

#: Everything that commands import when they run, so that no child does; of a reference where it is asked for.
MODULES = (
    "concurrent.futures.thread",
    "dsv4_convert.aot.program",
    "dsv4_convert.checkpoint.hub",
    "dsv4_convert.checkpoint.locate",
    "dsv4_convert.cli",
    "dsv4_convert.cli.progress",
    "dsv4_convert.cli.status",
    "dsv4_convert.convert.against",
    "dsv4_convert.convert.to_hf",
    "dsv4_convert.formats.kernels",
    "dsv4_convert.serve.generate",
    "dsv4_convert.store.orbax_processes",
    "dsv4_convert.golden.recorder",
    "dsv4_convert.golden.shrink",
    "dsv4_convert.golden.tokens",
    "orbax.checkpoint",
    "dsv4_convert.parity.report.words",
    "dsv4_convert.parity.run",
    "rich.console",
    "rich.progress",
    "safetensors.numpy",
    "tensorstore",
)
REFERENCE = ("torch", "transformers", "dsv4_convert.golden.references.streamed", "transformers.models.deepseek_v4")


def _prepare(settings: dict[str, Any]) -> None:
    for module in (*MODULES, *(REFERENCE if settings["reference"] else ())):
        importlib.import_module(module)
    if "endpoint" in settings:
        from huggingface_hub import constants

        from tests.checkpoint.hub_server import client_constants

        for name, value in client_constants(settings["endpoint"], Path(settings["hub_cache"])).items():
            setattr(constants, name, value)
    _build_commands()
    if settings["reference"]:
        import torch

        torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _build_commands() -> None:
    """Let typer make its commands, and import what it does for that, here and once: it is most of a small run."""
    import io

    import typer.main

    from dsv4_convert.cli import app

    typer.main.get_command = functools.cache(typer.main.get_command)
    words = (["convert", "hf-to-orbax"], ["convert", "orbax-to-hf"], ["golden", "record"], ["download"], ["parity"])
    for command in words:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
            app([*command, "--no-such-option"])


def _command(arguments: list[str]) -> int:
    """Run a command as the ``dsv4`` script does; the exit code that it ends with."""
    from dsv4_convert import cli

    # The command ends its process at once on a signal. Here KeyboardInterrupt goes through it, as in a notebook: what
    # is left behind can only be seen before the process ends.
    cli.interruptible = contextlib.nullcontext  # type: ignore[attr-defined]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.argv = ["dsv4", *arguments]
    try:
        cli.main()
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _child(request: dict[str, Any], shim: Shim) -> NoReturn:
    """In the fork: run what is asked for, report what is left of it, and end."""
    answer: dict[str, Any] = {}
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, name in ((1, "out"), (2, "err")):
            target = request.get("stdout") if name == "out" else None
            path = target or f"{request['result']}.{name}"
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
        os.chdir(request["cwd"])
        if (limit := request.get("file_size")) is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if (check := request.get("check")) is not None:
            what: Callable[..., Any] = getattr(acceptors, check["name"])
            answer["check"] = what(*check["arguments"])
        if request["arguments"] is not None:
            log = -1
            if (path := request.get("log")) is not None:
                log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            shim.arm(
                request["root"],
                at=request["at"],
                action=request["action"],
                value=request["value"],
                scope=request["scope"],
                log=log,
            )
            code = _command(request["arguments"])
            answer["seen"] = shim.disarm()
            threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does: it waits for threads
            answer["threads"] = [
                thread.name
                for thread in threading.enumerate()
                # A signal within Thread.start() leaves one on the list that never ran.
                if thread is not threading.main_thread() and not thread.daemon and thread.is_alive()
            ]
            answer["children"] = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="utf-8").split()
        else:
            code = 0
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        shim.disarm()
        answer["broken"] = traceback.format_exc()
    finally:
        Path(f"{request['result']}.json").write_text(json.dumps(answer), encoding="utf-8")
        os._exit(code)


def _fork(request: dict[str, Any], shim: Shim) -> int:
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be lost in the fork"
    pid = os.fork()
    if pid == 0:
        _child(request, shim)
    return pid


def _ended(pid: int, request: dict[str, Any]) -> dict[str, Any]:
    """Wait for a child, sending it the signals that were asked for at their times; one that hangs is killed."""
    started = time.monotonic()
    signals = [tuple(entry) for entry in request.get("signals", ())]
    deadline = request["timeout"]
    descriptor = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    hung = False
    while True:
        passed = time.monotonic() - started
        until = signals[0][0] if signals else deadline
        if poll.poll(max(0.0, until - passed) * 1000):
            break
        if signals:
            signal.pidfd_send_signal(descriptor, signals.pop(0)[1])
        else:
            hung = True
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            deadline += 1000
    os.close(descriptor)
    _, status = os.waitpid(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status), "hung": hung, "seconds": time.monotonic() - started}


def main() -> None:
    """Answer requests until stdin ends."""
    _prepare(json.loads(sys.argv[1]))
    shim = Shim()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    held: dict[int, dict[str, Any]] = {}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "run":
            answer = _ended(_fork(request, shim), request)
        elif request["do"] == "hold":  # it stops itself at its event
            pid = _fork(request, shim)
            _, status = os.waitpid(pid, os.WUNTRACED)
            if os.WIFSTOPPED(status):
                held[pid] = request
            answer = {"pid": pid if os.WIFSTOPPED(status) else None}
        else:  # release, by SIGCONT or SIGKILL
            os.kill(request["pid"], request["signal"])
            answer = _ended(request["pid"], held.pop(request["pid"]))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
