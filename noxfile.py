"""Sessions: ``demo`` does the main job, ``tests`` and ``lint`` check the code, ``docs`` makes the site.

Each sets itself up from nothing, with uv where it is there (``pip install 'nox[uv]'``). Versions are pinned by
``constraints.txt``; ``versions`` has pins of its own. ``versions`` and ``witnesses`` need uv and several Pythons on
PATH. ``torch`` comes from the index in DSV4_TORCH_INDEX where that is set, such as
https://download.pytorch.org/whl/cpu for the small CPU build; otherwise from the default index.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import nox

nox.options.sessions = ["lint", "tests"]
nox.options.error_on_missing_interpreters = True
nox.options.default_venv_backend = "uv|virtualenv"
nox.needs_version = ">=2025.5.1"

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
TEST = nox.project.dependency_groups(PROJECT, "test")
DOCS = nox.project.dependency_groups(PROJECT, "docs")
LINT = nox.project.dependency_groups(PROJECT, "lint")

#: One session each takes these, so they are not in constraints.txt.
ATHERIS, PIP_AUDIT = "atheris==3.0.0", "pip-audit>=2.9"

# uv installs no bytecode. Without what the first import of a module writes, each process that starts compiles JAX anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

#: XLA without LLVM's optimisations.
UNOPTIMISED = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
#: XLA's older kernels too, which compile in half of the time, and in one piece. The pinned XLA has them, the newest
#: lacks them.
QUICK = {
    "XLA_FLAGS": f"{UNOPTIMISED['XLA_FLAGS']} --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
}

#: Python -> the pins that ``versions`` installs there.
VERSIONS = {
    "3.11": ROOT / "constraints-oldest.txt",
    "3.12": ROOT / "constraints-newest.txt",
    "3.13": ROOT / "constraints-newest.txt",
}
#: The tests that ``versions`` runs. They need neither torch nor transformers.
CONTRACTS = ("tests/contracts", "--ignore=tests/contracts/test_transformers.py", "tests/cli/test_surface.py")

#: Project compared with -> the Python that it needs.
WITNESSES = {"automodel": "3.11", "maxtext": "3.12", "mlx": "3.12", "tokamax": "3.12"}

#: Model -> its small checkpoint's golden in golden/data.
GOLDENS = {"v4": "tiny", "v4.1": "tiny-v4.1"}

#: Session -> its tests in tests/witnesses. nano-deepseek-v4 is a negative control beside NeMo Automodel.
WITNESS_TESTS = {
    "automodel": ("automodel", "nano"),
    "maxtext": ("maxtext",),
    "mlx": ("mlx",),
    "tokamax": ("tokamax",),
}


def _install(session: nox.Session, *what: str, reference: bool = False) -> None:
    """Install dsv4 itself and more, at the pinned versions."""
    pinned = ("--constraint", str(CONSTRAINTS))
    if reference:
        index = os.environ.get("DSV4_TORCH_INDEX")
        session.install("pip")  # it has the settings of this machine, and uv's environments come without it
        chosen = ("--index-url", index) if index else ()
        session.run("python", "-m", "pip", "install", "--quiet", *pinned, *chosen, "torch==2.13.0")
    session.install(*pinned, ".[reference]" if reference else ".", *what)


def _programs(session: nox.Session) -> dict[str, str]:
    """The folder of the programs that earlier runs of the tests compiled, in which those of more than a month are gone.

    JAX finds a program there by its operations, the flags and the versions, so no change of the code goes unseen.
    """
    folder = Path(session.cache_dir).resolve() / "programs"
    for program in folder.glob("*"):
        if program.stat().st_mtime < time.time() - 30 * 24 * 3600:
            program.unlink()
    return {"JAX_COMPILATION_CACHE_DIR": str(folder)}


def _main_job(session: nox.Session, work: Path, model: str = "v4") -> None:
    """Convert a small ``model`` in ``work``, and compare every layer with its committed golden."""
    for name in ("checkpoint", "orbax"):
        shutil.rmtree(work / name, ignore_errors=True)
    session.run("dsv4", "golden", "make-checkpoint", str(work / "checkpoint"), "--model", model)
    session.run("dsv4", "convert", "hf-to-orbax", str(work / "checkpoint"), str(work / "orbax"))
    session.run("dsv4", "verify", str(work / "orbax"), "--against", str(work / "checkpoint"))
    golden = ROOT / "golden" / "data" / GOLDENS[model]
    baseline = ("--baseline", f"{golden}.baseline.json")
    session.run("dsv4", "parity", str(work / "orbax"), "--golden", str(golden), "--mode", "both", *baseline)


@nox.session
def demo(session: nox.Session) -> None:
    """Make a small checkpoint in the published format, convert it, and compare every layer with a recorded golden.

    ``nox -s demo -- v4.1`` does it with a small V4.1.
    """
    (model,) = session.posargs or ("v4",)
    _install(session, "tokenizers")
    _main_job(session, Path(session.create_tmp()).resolve(), model)


@nox.session
def golden(session: nox.Session) -> None:
    """Record a committed golden again; needed when taps or the checkpoint generator change.

    V4's comes from transformers. ``nox -s golden -- v4.1 DIR`` records V4.1's and its draft stages', from DeepSeek's
    own code: DIR is your copy of the ``inference`` folder. The baseline is then another one: delete it, and record it
    with --update-baseline.

    With this seed no query has equal scores at the edge of its choice, so that no tie depends on the machine.
    """
    model, *code = session.posargs or ("v4",)
    _install(session, reference=True)
    checkpoint, out = Path(session.create_tmp()).resolve() / GOLDENS[model], ROOT / "golden" / "data" / GOLDENS[model]
    for folder in (checkpoint, out):
        shutil.rmtree(folder, ignore_errors=True)
    asked = ["--random", "2x20" if code else "300", "--seed", "6"]
    if code:
        asked += ["--stages", "--numerics", "plain", "--reference", "release", "--release-code", *code]
    session.run("dsv4", "golden", "make-checkpoint", str(checkpoint), "--model", model)
    session.run("dsv4", "golden", "record", str(checkpoint), "--out", str(out), *asked)


@nox.session
def tests(session: nox.Session) -> None:
    """The whole test suite, against transformers and a plain Orbax. Arguments after -- go to pytest.

    Most programs run once, and compiling them takes longer than running, so XLA does it in its quickest way, and keeps
    them for the next run. One test (tests/test_optimised.py) compiles as users do, like demo, large and the benchmarks.
    """
    _install(session, *TEST, reference=True)
    session.run("pytest", *(session.posargs or ("-n", "2", "--dist", "worksteal")), env=QUICK | _programs(session))


@nox.session(python=list(VERSIONS), venv_backend="uv", download_python="never")
def versions(session: nox.Session) -> None:
    """The wheel with the oldest and the newest versions that it admits: the main job, and what we rely on in others.

    With the newest, deprecation warnings are errors in the commands too; in the tests every warning is.
    """
    assert isinstance(session.python, str)
    pins = VERSIONS[session.python]
    work = Path(session.create_tmp()).resolve()
    shutil.rmtree(work, ignore_errors=True)
    session.install("--constraint", str(pins), ".", *TEST)
    if pins == VERSIONS["3.13"]:
        session.env["PYTHONWARNINGS"] = (
            "error::DeprecationWarning,error::PendingDeprecationWarning,error::FutureWarning"
        )
    _main_job(session, work)
    session.run("pytest", *CONTRACTS, *session.posargs, env=UNOPTIMISED)


@nox.session(venv_backend="uv", download_python="never")
@nox.parametrize(
    ("witness", "python"), [nox.param(witness, python, id=witness) for witness, python in WITNESSES.items()]
)
def witnesses(session: nox.Session, witness: str) -> None:
    """Other implementations of DeepSeek-V4 beside ours, each in the environment that it needs; from PyPI, on a CPU.

    The first one has PyTorch, so it records the golden that tokamax is compared with.
    """
    assert isinstance(session.python, str)
    packages = Path(session.virtualenv.location, "lib", f"python{session.python}", "site-packages")
    tests = ROOT / "tests" / "witnesses"
    recorded = Path(session.cache_dir).resolve() / "tokamax"
    match witness:
        case "automodel":
            _install(session, reference=True)
            shutil.rmtree(recorded, ignore_errors=True)
            config = ROOT / "docs" / "examples" / "tokamax_ops" / "config.json"
            session.run("dsv4", "golden", "make-checkpoint", str(recorded / "hf"), "--config", str(config))
            session.run(
                *("dsv4", "golden", "record", str(recorded / "hf"), "--out", str(recorded / "golden")),
                *("--random", "262"),
            )
            # Its release of transformers replaces the one that records.
            session.install("--no-deps", "--requirement", str(tests / "automodel-requirements.txt"))
        case "maxtext":
            # Its dependencies stand in a file of the wheel, made for machines without Google Cloud.
            session.install("--no-deps", "maxtext==0.2.5")
            needed = packages / "dependencies/requirements/generated_requirements/decoupled-requirements.txt"
            session.install("--resolution=lowest", "--requirement", str(needed))
            session.env["DECOUPLE_GCLOUD"] = "TRUE"
        case "mlx":
            session.install("--no-deps", "--requirement", str(tests / "mlx-requirements.txt"))
        case "tokamax":
            session.install("--constraint", str(VERSIONS["3.12"]), "tokamax==0.0.17", ".")
            session.env["DSV4_TOKAMAX_GOLDEN"] = str(recorded / "golden")
    session.install(".", *TEST)
    session.env["JAX_PLATFORMS"] = "cpu"
    files = [str(file) for name in WITNESS_TESTS[witness] for file in sorted(tests.glob(f"test_{name}*.py"))]
    session.run("pytest", "-m", "witness", *files, *session.posargs, env=UNOPTIMISED)


@nox.session
def package(session: nox.Session) -> None:
    """The wheel by itself, away from the sources and without torch: every public name, their types, and the command."""
    work = Path(session.create_tmp()).resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    session.install("pip")
    session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(work), str(ROOT))
    (wheel,) = work.glob("*.whl")
    session.install("--constraint", str(CONSTRAINTS), str(wheel), "mypy")
    session.chdir(work)
    session.run("python", "-c", "import dsv4_convert as d; [getattr(d, name) for name in d.__all__]")
    session.run("python", "-c", "import torch", success_codes=[1], stderr=subprocess.DEVNULL)
    (work / "typed.py").write_text(
        "from pathlib import Path\nfrom dsv4_convert import Model, Weights, restore_model\n"
        "model: Model = restore_model(Weights.open(Path('orbax')))\n"
    )
    session.run("mypy", "--strict", "typed.py")
    session.run("dsv4", "doctor", "--offline")
    session.run("dsv4", "golden", "make-checkpoint", "checkpoint")
    session.run("dsv4", "convert", "hf-to-orbax", "checkpoint", "orbax")
    golden = ROOT / "golden" / "data" / "tiny"
    session.run("dsv4", "parity", "orbax", "--golden", str(golden), "--report", "report.html")


@nox.session
def thorough(session: nox.Session) -> None:
    """More of what the tests have already, and every bad input by every command; takes a quarter of an hour."""
    _install(session, *TEST, reference=True)
    session.run("pytest", "-m", "thorough", *(session.posargs or ("-n", "2")), env=QUICK | _programs(session))


@nox.session
def large(session: nox.Session) -> None:
    """A model of 4 GB from recording to parity in a quarter of that memory; takes two minutes and 13 GB of disk."""
    _install(session, *TEST, reference=True)
    session.run("pytest", "-m", "large", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Damaged files by the million for every reader, led by the code that they reach; takes five minutes.

    Arguments after -- go to `benchmarks.hostile damage`. Without atheris, which some platforms lack, less is found.
    """
    _install(session, "pip", *TEST)
    session.run("python", "-m", "pip", "install", ATHERIS, success_codes=[0, 1])
    session.run("python", "-m", "benchmarks.hostile", "damage", *session.posargs)


@nox.session
def audit(session: nox.Session) -> None:
    """Licences of everything that dsv4 brings along, and known vulnerabilities of the pinned versions."""
    _install(session, "packaging", PIP_AUDIT)
    session.run("python", "-m", "benchmarks.audit")


@nox.session
def tpu(session: nox.Session) -> None:
    """Programs for TPUs that are not there, parity's own among them, through the real compiler; takes five minutes."""
    _install(session, *TEST, reference=True)
    session.install("--constraint", str(CONSTRAINTS), ".[tpu]")
    session.run("pytest", "-m", "tpu", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation as a site, in site/; what does not resolve is an error, and every command of it is run."""
    _install(session, *DOCS, *TEST, reference=True)
    session.run("mkdocs", "build", "--strict", "--config-file", "docs/mkdocs/mkdocs.yml")
    session.run("pytest", "-m", "documentation", *(session.posargs or ("-n", "2")), env=QUICK)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting and types; with torch and transformers, whose types the recorder is checked against."""
    _install(session, *LINT, "nox", reference=True)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
