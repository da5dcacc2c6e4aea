"""Every command in README, CONTRIBUTING and docs is run, in the order of its page, and prints what the page shows.

README and CONTRIBUTING run with all other tests, the pages of the site with ``nox -s docs``.

The commands of a page run in the repository, with ``deepseek-ai/DeepSeek-V4-Flash`` on a Hub, which is a small model
here. The tables below list what cannot be run, with the reason; every other block has to run.
"""

from __future__ import annotations

import ast
import doctest
import importlib.util
import inspect
import re
import shutil
import subprocess
import tomllib
from itertools import dropwhile, pairwise
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import jax.numpy as jnp
import pytest
import typer
from typer.testing import CliRunner

import dsv4_convert
from dsv4_convert import pytest_plugin
from dsv4_convert.cli import app
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.spec.architectures import ARCHITECTURES
from dsv4_convert.spec.v4.taps import STATE, TAPS

from .checkpoint.hub_server import LoopbackHub
from .documentation import LOOKED_AT, RUN, Block, Command, blocks, commands, inline_commands, leaves, parse, unlike

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

#: Words of commands that this machine cannot run; ``dsv4`` only has to parse those commands.
PARSED_ONLY = {
    "--coordinator": "several processes or hosts; tests/parity/test_many.py and tests/store run them",
    "gs://": "needs a bucket; tests/store/test_bucket.py has one in memory",
    "hf://": "needs a dataset of the Hub; tests/checkpoint/test_hub_push.py pushes one",
    "--topology": "needs libtpu; nox -s tpu compiles for slices",
    "--tokenizer": "needs the real model's tokenizer; tests/serve makes one",
    "--release-code": "needs DeepSeek's own code, which may not be in this repository; tests/golden/test_release.py",
}
#: Commands that are none of ours, and what of them is checked instead.
NOT_RUN = {
    "nox": "the sessions are there",
    "python -m pip install": "the extras are there",
    "pytest": "the tests and the plugin's options are there; tests/test_foreign.py and tests/witnesses run them",
}
#: Programs that pages use between the commands, as they are.
TOOLS = ("cp", "mv")
#: Pages that show what a command prints of the real model; it runs on the small one, and only its exit code counts.
OF_THE_REAL_MODEL = ("./DeepSeek-V4-Pro ./pro-orbax", "inspect deepseek-ai/DeepSeek-V4-Flash")
#: Files that a page uses and does not create itself.
PREPARED = {
    "orbax": ("reference/python.md", "reference/outputs.md", "reference/orbax-format.md", "how-to/several-hosts.md")
}
#: Replaced in code before it runs.
REPLACED = {
    'make_mesh({"fsdp": 4, "tensor": 8}, jax.devices())': 'make_mesh({"fsdp": 1, "tensor": 1}, jax.devices()[:1])',
}


def _id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model, published and converted."""
    folder = tmp_path_factory.mktemp("documentation")
    write_checkpoint(folder / "checkpoint", tiny_config(), seed=0)
    arguments = ["convert", "hf-to-orbax", str(folder / "checkpoint"), str(folder / "orbax")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    return folder


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=_id(page), marks=() if page.parent == ROOT else pytest.mark.documentation)
        for page in PAGES
    ],
)
def test_a_page_does_what_it_says(
    page: Path, small: Path, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = blocks(page, ROOT)
    strange = [block.where for block in found if block.language not in (*RUN, *LOOKED_AT)]
    assert not strange, f"{strange}: write console, sh or python, which are run, or one of {LOOKED_AT}"
    files = {file.name: file.read_bytes() for file in (small / "checkpoint").iterdir()}
    hub.add("deepseek-ai/DeepSeek-V4-Flash", "a" * 40, files)
    for name in ("docs", "golden"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("DeepSeek-V4-Flash", "DeepSeek-V4-Pro"):
        (tmp_path / name).symlink_to(small / "checkpoint")
    for name, pages in PREPARED.items():
        if str(page.relative_to(ROOT / "docs" if "docs" in page.parts else ROOT)) in pages:
            shutil.copytree(small / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    names: dict[str, object] = {}
    for block in found:
        if block.language == "python":
            _execute(block, names)
        elif block.language in RUN:
            for command in commands(block):
                _run(command)


def _execute(block: Block, names: dict[str, object]) -> None:
    text = block.text
    for old, new in REPLACED.items():
        text = text.replace(old, new)
    exec(compile(text, block.where, "exec"), names)


def _run(command: Command) -> None:
    words = tuple(dropwhile(lambda word: "=" in word, command.words))  # without variables of the environment
    if words[0] == "dsv4":
        _dsv4(command)
    elif words[0] in TOOLS:
        subprocess.run(words, check=True)
    elif words[0] == "nox":
        sessions = [words[index + 1] for index, word in enumerate(words) if word == "-s"]
        assert sessions, f"{command.where}: {command.line}"
        assert set(sessions) <= _sessions(), f"{command.where}: {command.line}"
    elif words[:4] == ("python", "-m", "pip", "install"):
        wanted = re.findall(r"'\.\[([\w,]+)\]'", command.line)
        assert not {extra for each in wanted for extra in each.split(",")} - _extras(), command.line
    elif words[0] == "pytest":
        said = _said_against_pytest(words[1:])
        assert not said, f"{command.where}: {command.line}\n{said}"
    else:
        pytest.fail(f"{command.where}: {command.line!r} is not run: see TOOLS and NOT_RUN")


def _said_against_pytest(words: tuple[str, ...]) -> str:
    """The missing path or unknown option among the arguments of a ``pytest`` command of the repository.

    A golden may also be one that the page has recorded.
    """
    parser = Mock()
    pytest_plugin.pytest_addoption(parser)
    ours = {call.args[0] for call in parser.getgroup.return_value.addoption.call_args_list}
    paths = [
        word
        for before, word in pairwise(("", *words))
        if not (word.startswith("-") or before in ("-c", "--dsv4-golden"))
    ]
    absent = [path for path in paths if not (ROOT / path).exists()]
    unknown = [word for word in words if word.startswith("--dsv4") and word.partition("=")[0] not in ours]
    goldens = [value for option, value in pairwise(words) if option == "--dsv4-golden"]
    absent += [value for value in goldens if not ((ROOT / value).exists() or Path(value).exists())]
    return " ".join([*absent, *unknown]) if paths else "no tests"


def _dsv4(command: Command) -> None:
    if any(word.startswith(part) for word in command.words for part in PARSED_ONLY):
        said = parse(command.words)
        assert not said, f"{command.where}: {command.line}\n{said}"
        return
    result = CliRunner().invoke(app, list(command.words[1:]))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    what = f"{command.where}: {command.line}\nprinted, with exit code {result.exit_code}:\n{result.output}"
    if any(part in command.line for part in OF_THE_REAL_MODEL):
        assert result.exit_code == 0, what
        return
    assert (result.exit_code != 0) == command.fails, what
    missing = unlike(command.shown, result.output)
    assert missing is None, f"{what}\nand not what the page shows:\n{missing}"


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_commands_in_the_text_exist(page: Path) -> None:
    root = typer.main.get_command(app)
    known = leaves(root)
    groups = {path[:length] for path in known for length in range(len(path) + 1)}
    for text in inline_commands(page):
        words = tuple(word.strip(",.") for word in text.split()[1:])
        path: tuple[str, ...] = ()
        while len(path) < len(words) and (*path, words[len(path)]) in groups:
            path = (*path, words[len(path)])
        assert path or words[0].startswith("-"), f"{page.name}: {text}"
        named = [leaf for key, leaf in known.items() if key[: len(path)] == path]
        takers = named if path else [root]
        allowed = {"--help"} | {option for taker in takers for each in taker.params for option in each.opts}
        assert not {word for word in words if word.startswith("--")} - allowed, f"{page.name}: {text}"


def test_exceptions_are_needed() -> None:
    """A table of exceptions that outlives its reason would hide the next block."""
    every = [command for page in PAGES for block in blocks(page, ROOT) for command in _of(block)]
    for part in PARSED_ONLY:
        assert any(word.startswith(part) for command in every for word in command.words), part
    for start in (*NOT_RUN, *TOOLS):
        assert any(re.match(rf"(\w+=\S+ )*{re.escape(start)}\b", command.line) for command in every), start
    for part in OF_THE_REAL_MODEL:
        assert any(part in command.line for command in every), part
    code = "".join(block.text for page in PAGES for block in blocks(page, ROOT) if block.language == "python")
    assert all(old in code for old in REPLACED)


def _of(block: Block) -> list[Command]:
    return list(commands(block)) if block.language in ("console", "sh") else []


def test_a_page_that_lies_is_found() -> None:
    printed = "layer 1\nattn.wo_a  9e+06x  14 of 45 taps\ndisk  418.2 kB needed, 73.5 GB free\nFAIL: the end."
    assert unlike("layer 1\n…\n14 of 45 taps", printed) is None
    assert unlike("attn.wo_a   1e+07x\n14 of 45 taps\ndisk  1.0 MB needed, 2.0 TB free", printed) is None
    assert unlike("attn.wo_a  14 of 45 taps", printed) is not None
    assert unlike("attn.wo_a  9e+03x", printed) is not None
    assert unlike("15 of 45 taps", printed) is not None
    assert unlike("FAIL: the end.\n…\nlayer 1", printed) is not None
    assert unlike("attn.wo_b", printed) is not None
    assert parse(("dsv4", "parity", "--golden", "x", "--nonsense")) != ""
    assert parse(("dsv4", "parity", "--golden", "x", "--platform", "tpu")) == ""
    assert _said_against_pytest(("docs/examples/foreign", "--dsv4-golden", "golden/data/tiny")) == ""
    assert _said_against_pytest(("docs/examples/other", "--dsv4-model", "x")) == "docs/examples/other x --dsv4-model"


def test_tables_are_made_of_the_code_and_code_is_found() -> None:
    hooks = _hooks()
    pages = {_id(page): hooks.filled(page.read_text(encoding="utf-8")) for page in PAGES if "docs" in page.parts}
    assert not [name for name, text in pages.items() if re.search(r"^<!-- (table|code)", text, re.MULTILINE)]
    names = pages["docs/reference/names.md"]
    for rule in (rule for known in ARCHITECTURES for rule in known.names.rules):
        path = rule.path.removeprefix("layers.{}.").removeprefix("mtp.{}.").replace("{}", "N")
        assert f"| `{path}` |" in names
    taps = pages["docs/reference/taps.md"]
    assert all(f"| `{tap.name}` |" in taps for tap in (*TAPS, *STATE))
    reference = pages["docs/reference/commands.md"]
    for path, leaf in leaves(typer.main.get_command(app)).items():
        assert f"\n## dsv4 {' '.join(path)} " in reference
        assert all(f"`{each.opts[0]}" in reference for each in leaf.params if each.param_type_name == "option")
    with pytest.raises(ValueError, match="no nonsense"):
        hooks.filled("<!-- code: dsv4_convert/model/norm.py nonsense -->")


def _examples() -> dict[str, list[doctest.Example]]:
    """The docstring examples of every public name."""
    names = [name for name in dsv4_convert.__all__ if not name.startswith("_")]
    return {
        name: doctest.DocTestParser().get_examples(inspect.getdoc(getattr(dsv4_convert, name)) or "") for name in names
    }


def test_every_public_name_has_an_example() -> None:
    for name, examples in _examples().items():
        assert examples, name


@pytest.mark.documentation
def test_examples_do_what_they_say(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, target in (("golden", ROOT / "golden"), ("checkpoint", small / "checkpoint"), ("orbax", small / "orbax")):
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    known = {name: getattr(dsv4_convert, name) for name in dsv4_convert.__all__} | {"Path": Path, "jnp": jnp}
    for name, examples in _examples().items():
        said: list[str] = []
        doctest.DocTestRunner().run(doctest.DocTest(examples, dict(known), name, None, 0, None), out=said.append)
        assert not said, "".join(said)


def test_the_keys_of_all_json_are_on_their_page() -> None:
    """The keys of a command are in its row, the keys of a parity run in the table above."""
    page = (ROOT / "docs" / "reference" / "outputs.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `dsv4 ")}
    surface = ROOT / "tests" / "cli" / "surface" / "json"
    for file in surface.iterdir():
        command = f"dsv4 {file.stem.removesuffix('.dry-run').replace('.', ' ')}"
        keys = {re.split(r"[.:\[]", line)[0] for line in file.read_text(encoding="utf-8").splitlines()}
        where = page if command == "dsv4 parity" else rows[command]
        missing = {key for key in keys if f"`{key}`" not in where} - {"schema_version"}
        assert not missing, f"{command}: {sorted(missing)}"


def _hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "mkdocs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _sessions() -> set[str]:
    """The functions of the noxfile that are sessions."""
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list}


def _extras() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return set(project["project"]["optional-dependencies"])
