"""Do the tests find mistakes? Seeded mutants of the code: each is one small change, tried by the tests of its file.

A mutant turns a comparison, a sum, a product, a condition or a number into another one, or leaves out a call or
an error. The test modules of its room, and those that import the changed file, run until a test fails: at most
``--modules`` of them, first those that are named after it. A mutant is killed if a test fails, and survives if none
does. A run of more than ``--seconds``
of processor time is stopped: such a mutant usually loops, and counts as "stopped", not as killed. A module that fails
without a mutant is left out.

A survivor is one of three things: an equal program (a cache of another size), a text that no test reads, or a gap. The
output lists every survivor with its line, so that a person can say which. Further tests may kill it.

``--tests FOLDER`` tries the same mutants with other tests, such as those of an earlier commit: with the same code and
seed, two runs show whether a change of the tests lost anything. ``--only`` takes the paths that match a pattern, and
``--without`` leaves out test modules that match one.

Run: python -m benchmarks.mutants [--count 150] [--seed 0] [--part 1/2] [--tests FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("dsv4_convert", "parity", "golden")
#: Libraries that are imported before the forks. pytest imports its plugins itself.
MODULES = ("jax", "ml_dtypes", "numba", "numpy", "pytest", "rich", "safetensors", "torch", "typer")

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Div: ast.Mult,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A file's new text, and the change in words."""

    file: str
    line: int
    change: str
    text: str


def _changed(node: ast.AST) -> Iterator[ast.AST]:
    """The mutants of one node."""
    match node:
        case ast.Compare(left, [operator], comparators) if type(operator) in _COMPARISONS:
            yield ast.Compare(left, [_COMPARISONS[type(operator)]()], comparators)
        case ast.BinOp(left, operator, right) if type(operator) in _OPERATORS:
            if not any(isinstance(side, ast.JoinedStr | ast.List | ast.Tuple) for side in (left, right)):
                yield ast.BinOp(left, _OPERATORS[type(operator)](), right)
        case ast.BoolOp(operator, values):
            yield ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values)
        case ast.UnaryOp(ast.Not(), operand):
            yield operand
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() as value):
            yield ast.Constant(value + 1)
        case ast.IfExp(test, body, otherwise):
            yield ast.IfExp(test, otherwise, body)
        case ast.If(test):
            yield ast.UnaryOp(ast.Not(), test)
        case ast.Raise() | ast.Expr(ast.Call()):
            yield ast.Pass()


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below that do something: no annotations, decorators or texts, and nothing for type checkers alone."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            match child:
                case ast.JoinedStr() | ast.Import() | ast.ImportFrom() | ast.If(ast.Name("TYPE_CHECKING")):
                    continue
                case ast.Expr(ast.Constant()) | ast.AnnAssign(value=None):
                    continue
                case ast.AST():
                    yield child
                    yield from _executed(child)


def mutants(file: Path) -> Iterator[Mutant]:
    """All mutants of a file."""
    source = file.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in _executed(ast.parse(source)):
        # A mutant of an if statement changes its condition.
        old = node.test if isinstance(node, ast.If) else node
        for new in _changed(node):
            assert isinstance(old, ast.expr | ast.stmt)
            assert old.end_lineno is not None
            assert old.end_col_offset is not None
            start = starts[old.lineno - 1] + old.col_offset
            end = starts[old.end_lineno - 1] + old.end_col_offset
            words = ast.unparse(ast.fix_missing_locations(new))
            put = words if isinstance(new, ast.Pass) else f"({words})"
            text = (source[:start] + put.encode() + source[end:]).decode()
            before = " ".join(source[start:end].decode().split())
            yield Mutant(str(file.relative_to(ROOT)), old.lineno, f"{before}  ->  {words}", text)


def sample(count: int, seed: int, only: str) -> list[Mutant]:
    """Mutants of all files, each as likely as any other."""
    files = [
        file
        for package in PACKAGES
        for file in sorted((ROOT / package).rglob("*.py"))
        if not any(parent.is_symlink() for parent in file.parents) and re.search(only, str(file.relative_to(ROOT)))
    ]
    return Random(seed).sample([mutant for file in files for mutant in mutants(file)], count)


def _module(file: str) -> str:
    name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.startswith("dsv4_convert") else f"dsv4_convert.{name}"


def _imported(file: Path, module: str) -> set[str]:
    """Modules, and names of modules, that a file imports anywhere."""
    found = set()
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) + 1 - node.level], *([node.module] if node.module else [])])
            start = base if node.level else node.module
            found |= {f"{start}.{name.name}" for name in node.names} | {str(start)}
    return found


def covering(file: str, tests: Path, most: int, without: str) -> list[str]:
    """Test modules for a file: named after it, of its room, importing it or what its package has from it."""
    module = _module(file)
    package, _, last = module.rpartition(".")
    names = {module}
    init = ROOT / Path(file).parent / "__init__.py"
    if init.exists():
        for node in ast.walk(ast.parse(init.read_bytes())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[-1] == last:
                names |= {f"{package}.{name.name}" for name in node.names}
    room, *inner = module.split(".")[1:]
    found = []
    for path in tests.rglob("test_*.py"):
        name = str(path.relative_to(tests))
        if re.search(without, name):
            continue
        named = any(part in path.stem for part in inner)
        inside = name.split("/")[0] == room
        imports = bool(names & _imported(path, f"tests.{name}".replace("/", ".")))
        if imports or inside:
            found.append((not (named and inside), not imports, not inside, path.stat().st_size, name))
    return [name for *_, name in sorted(found)[:most]]


def _tried(work: Path, modules: list[str], log: Path, seconds: int) -> dict[str, Any]:
    """Fork, and run the modules there until a test fails."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(work)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            sys.path[:0] = [str(work)]
            os.environ["PYTHONPATH"] = str(work)
            import pytest

            options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", f"--basetemp={work.parent / 'files'}"]
            code = int(pytest.main([*options, *(f"tests/{module}" for module in modules)]))
        finally:
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    test = next(iter(re.findall(r"^(?:FAILED|ERROR) (\S+)", log.read_text(errors="replace"), re.MULTILINE)), "")
    # Without the name of a test, it was the time: of the processor, or of pytest's watch over tests that hang.
    return {
        "outcome": "survived" if code == 0 else "killed" if test else "stopped",
        "seconds": round(time.monotonic() - started, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "test": test,
    }


def main(arguments: argparse.Namespace) -> None:
    """Try the mutants in turn, and print what became of each."""
    part, of = map(int, arguments.part.split("/"))
    chosen = sample(arguments.count, arguments.seed, arguments.only)[part - 1 :: of]
    tests = arguments.tests or ROOT / "tests"
    results = []
    os.environ.update(JAX_PLATFORMS="cpu", OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", DSV4_CACHE="off")
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    for module in MODULES:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(prefix="dsv4-mutants-") as folder:
        work = Path(folder) / "repository"
        ignored = ("__pycache__", ".git", ".nox", ".venv", "site", "tests", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, work, symlinks=True, ignore=shutil.ignore_patterns(*ignored))
        shutil.copytree(tests, work / "tests", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        # Most mutants need the programs of the healthy code.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/programs")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
        sound: dict[str, bool] = {}
        for mutant in chosen:
            modules = covering(mutant.file, tests, arguments.modules, arguments.without)
            for module in modules:
                if module not in sound:
                    sound[module] = (
                        _tried(work, [module], Path(folder) / "log", arguments.seconds)["outcome"] != "killed"
                    )
                    if not sound[module]:
                        print(f"{module} fails without a mutant, and is left out", flush=True)
            modules = [module for module in modules if sound[module]]
            changed = work / mutant.file
            healthy = changed.read_text(encoding="utf-8")
            if not modules:
                result: dict[str, Any] = {"outcome": "without tests", "test": ""}
            else:
                changed.write_text(mutant.text, encoding="utf-8")
                result = _tried(work, modules, Path(folder) / "log", arguments.seconds)
                changed.write_text(healthy, encoding="utf-8")
            results.append({"file": mutant.file, "line": mutant.line, "change": mutant.change, **result})
            where = f"{mutant.file}:{mutant.line}"
            print(f"{result['outcome']:14}{where}  {mutant.change}  {result['test']}", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(dict(Counter(result["outcome"] for result in results)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="1/1", help="one of so many parts of the mutants")
    parser.add_argument("--only", default="")
    parser.add_argument("--modules", type=int, default=4)
    parser.add_argument("--without", default="(?!)")
    parser.add_argument("--tests", type=Path)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--json", type=Path)
    main(parser.parse_args())
