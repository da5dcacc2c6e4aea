"""The checks of the machine. Each looks at one thing and changes nothing that stays."""

from __future__ import annotations

import importlib.metadata
import json
import locale
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from dsv4_convert.cache import cache_folder
from dsv4_convert.doctor.finding import Diagnosis, Finding, State
from dsv4_convert.files.limits import free_bytes, nearest_folder
from dsv4_convert.show.units import size

#: Seconds that the Hub, and that JAX's search for devices, may take.
_HUB_SECONDS, _JAX_SECONDS = 5.0, 120.0
#: Below these the commands named do not get far. A conversion asks for 2 GiB beside the interpreter if not told less.
_LEAST_MEMORY, _LEAST_DISK, _LEAST_FILES = 3 << 30, 10**9, 256
_DOWNLOADING = "download, convert, inspect"

#: Run in a process of its own: what loads is known then, and a device that another process holds cannot hang us.
_LOAD = """
import json, os
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import dsv4_convert.convert, dsv4_convert.golden.archive, dsv4_convert.weights.published, dsv4_convert.weights.restore
import jax
found = jax.devices()
print(json.dumps([jax.default_backend(), len(found), found[0].device_kind]))
"""


def examine(*, offline: bool = False, say: Callable[[str], None] = lambda _: None) -> Diagnosis:
    """Check everything. With ``offline`` the Hub is not asked."""
    findings: list[Finding] = []
    for title, check in (
        ("packages", _packages),
        ("devices", _devices),
        ("machine", _machine),
        ("Hub", lambda: _hub(offline=offline)),
        ("kernels", _kernels),
        ("programs", _programs),
        ("terminal", _terminal),
    ):
        say(title)
        try:
            findings += check()
        except ImportError as error:  # a package that the check itself needs
            findings.append(_unloadable(title, error))
        except OSError as error:
            findings.append(_refused(title, error))
    return Diagnosis(tuple(findings))


def _unloadable(check: str, error: ImportError) -> Finding:
    return Finding(
        check=check,
        state=State.MISSING,
        found=str(error),
        way_out="python -m pip install ., in a checkout of dsv4 and a new environment",
        core=True,
    )


def _refused(check: str, error: OSError, commands: str = "all") -> Finding:
    """The finding of a check that the system refused to run."""
    return Finding(
        check=check,
        state=State.MISSING,
        found=f"cannot be looked at: {error.strerror or error}",
        commands=commands,
        way_out=f"check the path {error.filename}" if error.filename else "check the paths that the environment names",
    )


def _packages() -> Iterator[Finding]:
    from dsv4_convert.doctor.packages import Asked, check_packages

    try:
        asked = Asked.read()
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            check="dsv4",
            state=State.MISSING,
            found="neither installed nor beside its pyproject.toml",
            way_out="python -m pip install ., in a checkout of dsv4",
            core=True,
        )
        return
    yield from check_packages(asked, platform.python_version())


def _devices() -> Iterator[Finding]:
    """Whether the core loads, and what JAX computes on."""
    try:
        run = subprocess.run([sys.executable, "-c", _LOAD], capture_output=True, text=True, timeout=_JAX_SECONDS)
    except subprocess.TimeoutExpired:
        yield Finding(
            check="jax",
            state=State.MISSING,
            found=f"no device within {_JAX_SECONDS:.0f} s",
            way_out="end the process that holds the accelerator, or set JAX_PLATFORMS=cpu",
            core=True,
        )
        return
    if run.returncode:
        yield Finding(
            check="jax",
            state=State.MISSING,
            found=next(iter(run.stderr.strip().splitlines()[-1:]), "the core does not load"),
            way_out="python -m pip install ., in a checkout of dsv4 and a new environment",
            core=True,
        )
        return
    backend, count, kind = json.loads(run.stdout.strip().splitlines()[-1])
    devices = f"{count} x {kind}" if kind != backend else f"{count} device" + "s" * (count > 1)
    yield Finding(check="jax", state=State.OK, found=f"computes on {backend}, {devices}", core=True)


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding(check="cores", state=State.OK, found=f"{cores}")
    memory = _memory()
    enough = memory is None or memory >= _LEAST_MEMORY
    yield Finding(
        check="memory",
        state=State.OK if enough else State.WARN,
        found="not told by the system" if memory is None else f"{memory / 2**30:.1f} GiB",
        way_out=None if enough else "give convert less: --max-memory 800MiB; generate needs room for the whole model",
    )
    yield _disk("disk, here", Path.cwd(), "convert, golden record")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = files != resource.RLIM_INFINITY and files < _LEAST_FILES
    yield Finding(
        check="open files",
        state=State.WARN if few else State.OK,
        found="without limit" if files == resource.RLIM_INFINITY else f"{files:,} at most",
        commands="convert, parity",
        way_out="ulimit -n 4096" if few else None,
    )


def _memory() -> int | None:
    """Bytes of this machine, or of the container where that has fewer."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        return min(total, int(limit)) if limit.isdecimal() else total
    except OSError:
        return total


def _disk(check: str, folder: Path, commands: str) -> Finding:
    try:
        free = free_bytes(folder)
    except OSError as error:
        return _refused(check, error, commands)
    enough = free >= _LEAST_DISK
    return Finding(
        check=check,
        state=State.OK if enough else State.WARN,
        found=f"{size(free)} free in {folder}",
        commands=commands,
        way_out=None if enough else "make room, or work in a folder of another disk",
    )


def _hub(*, offline: bool) -> Iterator[Finding]:
    from dsv4_convert.checkpoint import hub_health

    folder = hub_health.cache_folder()
    yield _disk("disk, Hub", folder, _DOWNLOADING)
    writable = _writable(folder)
    yield Finding(
        check="Hub cache",
        state=State.OK if writable else State.MISSING,
        found=f"{folder}, {'writable' if writable else 'not writable'}",
        commands=_DOWNLOADING,
        way_out=None if writable else "export HF_HOME=/a/folder/of/yours",
    )
    token = hub_health.has_token()
    yield Finding(
        check="Hub token",
        state=State.OK,
        found="there is one" if token else "none: public repositories only (HF_TOKEN, or hf auth login)",
        commands=_DOWNLOADING,
    )
    reason = "not asked" if offline else hub_health.unreachable(_HUB_SECONDS)
    yield Finding(
        check="Hub",
        state=State.OK if reason is None or offline else State.WARN,
        found=f"{hub_health.endpoint()}: {'answers' if reason is None else reason}",
        commands=_DOWNLOADING,
        way_out=None if reason is None or offline else "check the network and HTTPS_PROXY; local folders work without",
    )


def _writable(folder: Path) -> bool:
    try:
        return os.access(nearest_folder(folder), os.W_OK)
    except OSError:
        return False


def _kernels() -> Iterator[Finding]:
    """The folder in which numba may cache compiled code, found in numba's own order."""
    beside = Path(__file__).parents[1] / "formats"
    places = [os.environ.get("NUMBA_CACHE_DIR"), str(beside), str(Path.home() / ".cache")]
    for place in filter(None, places):
        if _takes_files(Path(place)):
            yield Finding(check="numba cache", state=State.OK, found=place, commands="convert, parity --source")
            return
    yield Finding(
        check="numba cache",
        state=State.WARN,
        found="no folder can be written, so kernels are compiled anew in every run",
        commands="convert, parity --source",
        way_out="export NUMBA_CACHE_DIR=/a/folder/of/yours",
    )


def _programs() -> Iterator[Finding]:
    """The folder of compiled programs, which make the second run fast."""
    commands = "parity, generate"
    mine = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    folder = cache_folder() if mine is None else Path(mine)
    if folder is None:
        yield Finding(check="dsv4 cache", state=State.OK, found="off (DSV4_CACHE)", commands=commands)
        return
    good = _takes_files(folder)
    kept = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    yield Finding(
        check="dsv4 cache",
        state=State.OK if good else State.WARN,
        found=f"{folder}, {size(kept)}"
        if good
        else f"{folder} cannot be written, so programs are compiled in every run",
        commands=commands,
        way_out=None if good else "export DSV4_CACHE=/a/folder/of/yours",
    )


def _takes_files(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=nearest_folder(folder)):
            return True
    except OSError:
        return False


def _terminal() -> Iterator[Finding]:
    encoding = sys.stdout.encoding or locale.getpreferredencoding(False)
    good = encoding.lower().replace("-", "") == "utf8"
    yield Finding(
        check="text",
        state=State.OK if good else State.WARN,
        found=f"written as {encoding}",
        way_out=None if good else "export PYTHONUTF8=1",
    )
