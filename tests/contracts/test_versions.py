"""The ranges of ``pyproject.toml`` are those that ``nox -s versions`` runs, and those that the code knows."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dsv4_convert.golden.recorder import TRANSFORMERS

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = tomllib.loads(PYPROJECT)["project"]
CORE = {one.name.lower().replace("_", "-"): one for one in map(Requirement, PROJECT["dependencies"])}


def pinned(name: str) -> dict[str, str]:
    """The versions of a file of pins by package."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    matches = [re.match(r"([\w.-]+)==([^\s;]+)", line) for line in lines]
    return {match[1].lower().replace("_", "-"): match[2] for match in matches if match}


@pytest.mark.parametrize("name", CORE)
def test_the_oldest_environment_has_the_lower_bounds(name: str) -> None:
    """A run has had every bound of the core that pyproject.toml claims."""
    (lowest,) = [one.version for one in CORE[name].specifier if one.operator == ">="]
    assert re.fullmatch(rf"{re.escape(lowest)}(\.0)*", pinned("constraints-oldest.txt")[name])


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt", "constraints-newest.txt"])
def test_every_environment_is_within_the_ranges(file: str) -> None:
    versions = pinned(file)
    assert [name for name, one in CORE.items() if not one.specifier.contains(versions[name])] == []


def test_an_upper_bound_names_the_test_that_says_why() -> None:
    lines = PYPROJECT.splitlines()
    for index, line in enumerate(lines):
        if re.match(r'\s+"[\w-]+(\[\w+\])?>=[^"]*<', line):
            (named,) = re.findall(r"tests/\S+\.py", lines[index - 1])
            assert (ROOT / named).is_file(), line


def test_the_recorder_knows_the_releases_that_the_extra_brings() -> None:
    extra = {one.name: one.specifier for one in map(Requirement, PROJECT["optional-dependencies"]["reference"])}
    assert extra["transformers"] == Requirement(f"transformers{TRANSFORMERS}").specifier
