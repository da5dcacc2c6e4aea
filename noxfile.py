"""Sessions: ``demo`` does the main job, ``tests`` and ``lint`` check the code. Each sets itself up from nothing.

Versions are pinned by ``constraints.txt``. ``torch`` comes from the index in DSV4_TORCH_INDEX where that is set, such
as https://download.pytorch.org/whl/cpu for the small CPU build; otherwise from the default index.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

nox.options.sessions = ["lint", "tests"]
nox.options.error_on_missing_interpreters = True
nox.needs_version = ">=2025.5.1"

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
TEST = nox.project.dependency_groups(PROJECT, "test")
LINT = nox.project.dependency_groups(PROJECT, "lint")


def _install(session: nox.Session, *what: str, reference: bool = False) -> None:
    """Install dsv4 itself and more, at the pinned versions."""
    pinned = ("--constraint", str(CONSTRAINTS))
    if reference:
        index = os.environ.get("DSV4_TORCH_INDEX")
        session.install(*pinned, *(("--index-url", index) if index else ()), "torch==2.13.0")
    session.install(*pinned, ".[reference]" if reference else ".", *what)


@nox.session
def demo(session: nox.Session) -> None:
    """Make a small checkpoint in the published format, convert it, and compare every layer with a recorded golden."""
    _install(session)
    work = Path(session.create_tmp()).resolve()
    for name in ("checkpoint", "orbax"):
        shutil.rmtree(work / name, ignore_errors=True)
    session.run("dsv4", "golden", "make-checkpoint", str(work / "checkpoint"))
    session.run("dsv4", "convert", "hf-to-orbax", str(work / "checkpoint"), str(work / "orbax"))
    session.run("dsv4", "verify", str(work / "orbax"), "--against", str(work / "checkpoint"))
    golden = ROOT / "golden" / "data" / "tiny"
    session.run("dsv4", "parity", str(work / "orbax"), "--golden", str(golden), "--mode", "both", "--quiet")


@nox.session
def golden(session: nox.Session) -> None:
    """Record the committed golden again, from transformers; needed when taps or the checkpoint generator change.

    With this seed no query has equal scores at the edge of its choice, so that no tie depends on the machine.
    """
    _install(session, reference=True)
    work = Path(session.create_tmp()).resolve()
    out = ROOT / "golden" / "data" / "tiny"
    for folder in (work / "tiny", out):
        shutil.rmtree(folder, ignore_errors=True)
    session.run("dsv4", "golden", "make-checkpoint", str(work / "tiny"))
    session.run("dsv4", "golden", "record", str(work / "tiny"), "--out", str(out), "--random", "300", "--seed", "6")


@nox.session
def tests(session: nox.Session) -> None:
    """The whole test suite, against transformers and a plain Orbax. Arguments after -- go to pytest.

    XLA leaves out LLVM's optimisations: most programs run once, and compiling takes longer than running. One test
    (tests/test_optimised.py) compiles as users do, as demo, large and the benchmarks do.
    """
    _install(session, *TEST, reference=True)
    unoptimised = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    session.run("pytest", *(session.posargs or ("-n", "2", "--dist", "worksteal")), env=unoptimised)


@nox.session
def large(session: nox.Session) -> None:
    """A model of 4 GB from recording to parity in a quarter of that memory; takes two minutes and 13 GB of disk."""
    _install(session, *TEST, reference=True)
    session.run("pytest", "-m", "large", *session.posargs)


@nox.session
def tpu(session: nox.Session) -> None:
    """Programs for TPUs that are not there, through the real compiler; takes two minutes and no TPU."""
    _install(session, *TEST, reference=True)
    session.install("--constraint", str(CONSTRAINTS), ".[tpu]")
    session.run("pytest", "-m", "tpu", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting and types; with torch and transformers, whose types the recorder is checked against."""
    _install(session, *LINT, "nox", reference=True)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
