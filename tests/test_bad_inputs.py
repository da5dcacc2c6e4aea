"""Nothing bad gets through: every case of the catalogue, through the commands that meet it."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .bad_inputs.case import TOKEN, Bench, Case, Place, examine
from .bad_inputs.catalogue import CATALOGUE, ELSEWHERE, IDS, Elsewhere

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bad-inputs")
    return Bench(folder)


def test_every_id_has_a_case_or_a_test_elsewhere() -> None:
    covered = {case.id for case in CATALOGUE.values()} | {other.id for other in ELSEWHERE}
    assert covered == set(IDS)
    assert len(IDS) == 23 + 16 + 15 + 9 + 20 + 17 + 12 + 14


@pytest.mark.parametrize("other", ELSEWHERE, ids=lambda other: other.id)
def test_the_tests_elsewhere_exist(other: Elsewhere) -> None:
    path, name = other.test.split("::")
    defined = {
        node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)
    }
    assert name in defined


def _brief() -> list[Case]:
    """The quickest case of every id, and every case that one command refuses before it reads a weight."""
    chosen: dict[str, Case] = {}
    for case in sorted(CATALOGUE.values(), key=lambda case: case.slow):
        if case.id not in {one.id for one in chosen.values()} or not (case.slow or case.accepted):
            chosen[case.name] = case.first_step
    return [chosen[name] for name in CATALOGUE if name in chosen]


@pytest.mark.parametrize("case", _brief(), ids=lambda case: case.name)
def test_it_is_answered_rightly(bench: Bench, case: Case) -> None:
    assert examine(bench, case) == []


@pytest.mark.thorough
@pytest.mark.parametrize("name", CATALOGUE)
def test_every_command_answers_it_rightly(bench: Bench, name: str) -> None:
    assert examine(bench, CATALOGUE[name]) == []


def test_a_case_that_is_not_answered_rightly_is_told(bench: Bench) -> None:
    """Each of the things that every case asks for can be missing."""
    case = CATALOGUE["F01 0 bytes"].first_step
    (step,) = case.steps
    healthy = dataclasses.replace(case, edit=lambda place: None)
    assert "exit code 0, expected 3" in examine(bench, healthy)[0]
    (problem,) = examine(bench, dataclasses.replace(case, steps=(dataclasses.replace(step, says=("another",)),)))
    assert "does not say 'another'" in problem
    assert (
        "exit code 3, expected 1"
        in examine(bench, dataclasses.replace(case, steps=(dataclasses.replace(step, code=1),)))[0]
    )
    left = dataclasses.replace(case, during=_leaves_something)
    assert "something is at the destination after exit code 3" in examine(bench, left)[0]
    talkative = dataclasses.replace(case, edit=lambda place: (place.root / TOKEN).write_text(TOKEN), steps=())
    assert examine(bench, talkative)[0].startswith("the token is in")


@contextmanager
def _leaves_something(place: Place) -> Iterator[None]:
    yield
    place.dest.mkdir()
    (place.dest / "part").write_bytes(b"1")
