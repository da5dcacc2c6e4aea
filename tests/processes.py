"""Starting several real processes that join under ``jax.distributed``, or one with several simulated devices."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]


class Ended(NamedTuple):
    """A process that has ended."""

    code: int
    out: str
    err: str


def start(arguments: Sequence[str], *, devices: int = 1) -> subprocess.Popen[str]:
    """Python with these arguments, on a CPU that JAX takes for so many devices; XLA has the flags of this process."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, *arguments]
    return subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def end(process: subprocess.Popen[str], *, timeout: int = 240) -> Ended:
    """Wait for it; one that takes too long is killed."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        err += f"\nstill running after {timeout} s"
    return Ended(process.returncode, out, err)


def together(
    arguments: Sequence[str], count: int, *, devices: int = 1, own: Sequence[Sequence[str]] = ()
) -> list[Ended]:
    """``count`` processes of the same command with the flags that join them; ``own``: arguments of each one's own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    joined = ["--coordinator", f"localhost:{port}", "--num-processes", str(count), "--process-id"]
    started = [
        start([*arguments, *(own[index] if own else ()), *joined, str(index)], devices=devices)
        for index in range(count)
    ]
    return [end(process) for process in started]
