"""The rooms and the direction of their dependencies, as the design draws them. Nothing points back."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.mkdocs.picture import FLOORS
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint

ROOT = Path(__file__).parent.parent
PACKAGES = ("dsv4_convert", "parity", "golden")

#: Each imports from the groups before its own. Rooms are the packages in dsv4_convert, two of which are
#: links to folders beside it; their order is the picture's. ``root`` are plain modules, ``package`` the public names,
#: loaded lazily, and ``pytest_plugin`` is loaded by pytest wherever dsv4 is installed.
ORDER: tuple[frozenset[str], ...] = (
    frozenset({"show"}),
    frozenset({"root"}),
    frozenset({"platforms"}),
    *map(frozenset, FLOORS[-2:0:-1]),
    frozenset({"package", "pytest_plugin"}),
    frozenset({"cli"}),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}

#: These import neither JAX nor the model.
WITHOUT_JAX = {"show", "root", "files", "spec", "formats", "checkpoint", "convert", "golden", "inspection"}

#: Library -> the files that may import it at all.
CONFINED: dict[str, str | tuple[str, ...]] = {
    "blake3": "dsv4_convert/store/digests.py",
    "torch": "golden/references/",
    "transformers": "golden/references/",
    "orbax": "dsv4_convert/store/orbax_",
    "etils": "dsv4_convert/store/bucket.py",
    "filelock": "dsv4_convert/files/",
    "fsspec": "dsv4_convert/files/remote.py",
    "numba": "dsv4_convert/formats/",
    "huggingface_hub": ("dsv4_convert/checkpoint/hub", "dsv4_convert/files/remote.py"),
    "typer": "dsv4_convert/cli/",
    "click": "nowhere",
    "matplotlib": "parity/report/html/",
    "jinja2": ("parity/report/html/", "golden/chat.py"),
    "markupsafe": "parity/report/html/",
    "pandas": "parity/report/frame.py",
    "pyarrow": "parity/report/frame.py",
    "pytest": "dsv4_convert/pytest_plugin.py",
    # Only the name of an exception that Numba's own cache raises.
    "pickle": "dsv4_convert/formats/kernels.py",
}


def _files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def _imports(path: Path) -> Iterator[str]:
    """Dotted names of everything imported anywhere in a file, inside functions and for type checking too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            assert node.module is not None
            # "from package import module" imports the module, so both names are candidates.
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _room(module: str) -> str | None:
    """The room of a dotted module name; None for a foreign one."""
    parts = module.split(".")
    assert parts[0] not in ("parity", "golden"), f"{module}: these packages are installed as dsv4_convert.{parts[0]}"
    if parts[0] != "dsv4_convert":
        return None
    if parts[1:] == ["__main__"]:
        return "cli"
    if len(parts) == 1 or parts[1].startswith("_"):
        return "package"
    return "root" if parts[1] not in LEVEL and (ROOT / "dsv4_convert" / f"{parts[1]}.py").exists() else parts[1]


def _module(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if name.startswith("dsv4_convert") else f"dsv4_convert.{name}"


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = _room(_module(path))
    assert room in LEVEL, f"a room that the picture does not have: {room}"
    for module in _imports(path):
        target = _room(module)
        if target == "package" and module == "dsv4_convert":
            continue  # only the names after it count
        if target in LEVEL and target != room:
            assert LEVEL[target] < LEVEL[room], f"{path.relative_to(ROOT)} ({room}) imports {module} ({target})"


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_libraries_stay_where_they_belong(path: Path) -> None:
    where = path.relative_to(ROOT).as_posix()
    for module in _imports(path):
        allowed = CONFINED.get(module.split(".")[0])
        assert allowed is None or where.startswith(allowed), f"{where} imports {module}, which belongs to {allowed}"


def test_a_class_name_means_one_thing() -> None:
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in _files())
    names = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert not {name for name, count in names.items() if count > 1}


def test_what_only_moves_bytes_knows_nothing_of_jax() -> None:
    for path in _files():
        if _room(_module(path)) in WITHOUT_JAX:
            imported = set(_imports(path))
            assert not {"jax", "flax"} & {module.split(".")[0] for module in imported}, path
            assert "model" not in map(_room, imported), path


def _loaded(code: str) -> set[str]:
    """Top-level modules that a fresh process has loaded after ``code``."""
    script = f"{code}\nimport sys; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return set(output.split())


HEAVY = {"jax", "flax", "torch", "transformers", "orbax", "numba", "numpy", "huggingface_hub", "tensorstore"}


def test_neither_conversion_nor_parity_loads_torch() -> None:
    loaded = _loaded(
        "import dsv4_convert.convert, dsv4_convert.weights.restore\n"
        "import dsv4_convert.parity.run, dsv4_convert.parity.report.tables\n"
        "import dsv4_convert.golden.archive, dsv4_convert.golden.synthetic"
    )
    assert {"jax", "flax"} <= loaded
    assert not {"torch", "transformers", "matplotlib", "jinja2"} & loaded


def test_copying_published_bytes_loads_neither_orbax_nor_numba(tmp_path: Path) -> None:
    """Each of them takes longer to load than a gigabyte takes to convert."""
    write_checkpoint(tmp_path / "hf", tiny_config())
    paths = [str(tmp_path / "hf"), str(tmp_path / "orbax")]
    loaded = _loaded(f"from dsv4_convert import Storage, hf_to_orbax; hf_to_orbax(*{paths}, storage=Storage.SOURCE)")
    assert not (HEAVY - {"numpy"}) & loaded
    assert (tmp_path / "orbax" / "_METADATA").exists()


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['dsv4', '--help']\n"
        "from dsv4_convert.cli import main\n"
        "import contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main()"
    )
    assert not HEAVY & _loaded(code)


def test_the_package_itself_loads_nothing() -> None:
    assert not HEAVY & _loaded("import dsv4_convert")
    # pytest loads it in every project where dsv4 is installed.
    assert not (HEAVY | {"rich"}) & _loaded("import dsv4_convert.pytest_plugin")
    assert {"jax", "flax"} <= _loaded("from dsv4_convert import Model")


def test_completion_knows_words_and_loads_nothing_heavy() -> None:
    """bash, zsh and fish ask the command itself at every tab."""
    asked = {
        "bash": ("dsv4 parity --taps attn.q", "attn.q_rope"),
        "zsh": ("dsv4 compile --topology v5p-5", "v5p-512"),
        "fish": ("dsv4 convert hf-to-orbax --dtype ", "bfloat16"),
    }
    code = (
        "import contextlib, io, os, sys; sys.argv = ['dsv4']\n"
        "from dsv4_convert.cli import main\n"
        f"for shell, (line, word) in {asked!r}.items():\n"
        "    os.environ.update(_DSV4_COMPLETE=f'complete_{shell}', COMP_WORDS=line, _TYPER_COMPLETE_ARGS=line)\n"
        "    os.environ.update(COMP_CWORD=str(line.count(' ')), _TYPER_COMPLETE_FISH_ACTION='get-args')\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit): main()\n"
        "    assert word in out.getvalue(), (shell, out.getvalue())\n"
    )
    assert not HEAVY & _loaded(code)


def test_a_users_own_modules_may_have_the_names_of_our_folders(tmp_path: Path) -> None:
    """``parity`` and ``golden`` lie beside ``dsv4_convert`` here, and inside it where it is imported and installed."""
    for name in ("parity", "golden"):
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import golden, parity\n"
        "from dsv4_convert import Golden, open_golden, run_parity\n"
        "assert golden.MINE and parity.MINE\n"
    )
    subprocess.run([sys.executable, str(script)], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
