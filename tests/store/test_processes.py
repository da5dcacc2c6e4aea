"""Processes that write one checkpoint together: they wait for each other, and a failure of one is a failure of all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4_convert.errors import ResourceError, UsageError
from dsv4_convert.store import Processes, WriteSummary, open_store, verify

from .writing import FilledLeaf, write_leaves


class Service:
    """A key-value store as JAX's coordination service has it, for threads that play processes."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def key_value_set(self, key: str, value: str) -> None:
        with self._changed:
            assert key not in self._values, key
            self._values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, timeout=60), key
            return self._values[key]


def together(count: int, action: Callable[[Processes], Any]) -> list[Any]:
    """Run the action as every process; results and exceptions in the order of the processes."""
    service = Service()

    def one(index: int) -> Any:
        try:
            return action(Processes(index=index, count=count, service=service))
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def leaf(made: list[int], rows: int = 24) -> FilledLeaf:
    def chunks(index: tuple[int, ...]) -> np.ndarray:
        made.append(index[0])
        return np.full((1, 5), index[0], np.int32)

    return FilledLeaf(path="w", shape=(rows, 5), dtype=np.dtype("<i4"), chunk_shape=(1, 5), chunks=chunks)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_each_writes_its_share_and_the_result_is_that_of_one(tmp_path: Path, count: int) -> None:
    made: list[list[int]] = [[] for _ in range(count)]

    def write(processes: Processes) -> WriteSummary:
        return write_leaves(tmp_path / "shared", [leaf(made[processes.index])], processes=processes, workers=1)

    summaries = together(count, write)
    write_leaves(tmp_path / "alone", [leaf([])])
    assert sorted(row for rows in made for row in rows) == list(range(24))
    assert all(rows == list(range(rows[0], rows[-1] + 1)) for rows in made)
    assert max(map(len, made)) - min(map(len, made)) <= 1
    assert all(summary.records == summaries[0].records for summary in summaries)
    assert verify(open_store(tmp_path / "shared")) == []
    shared, alone = (
        {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}
        for root in (tmp_path / "shared", tmp_path / "alone")
    )
    assert shared == alone
    assert not (tmp_path / "shared.dsv4-partial").exists()


def test_a_failure_of_one_stops_all_and_what_was_written_is_kept(tmp_path: Path) -> None:
    def write(processes: Processes) -> WriteSummary:
        spec = leaf([])
        if processes.index == 1:

            def fail(index: tuple[int, ...]) -> np.ndarray:
                if index[0] >= 20:
                    raise RuntimeError("source lost")
                return spec.chunks(index)

            return write_leaves(tmp_path / "out", [replace(spec, chunks=fail)], processes=processes, workers=1)
        return write_leaves(tmp_path / "out", [spec], processes=processes, workers=1)

    first, second = together(2, write)
    assert isinstance(second, RuntimeError)
    assert isinstance(first, ResourceError)
    assert "process 1 of 2 failed in step 'write': RuntimeError: source lost" in str(first)
    assert not (tmp_path / "out").exists()
    made: list[int] = []
    summary = write_leaves(tmp_path / "out", [leaf(made)])
    assert sorted(made) == [20, 21, 22, 23]
    assert summary.kept_bytes == 20 * 5 * 4
    assert verify(open_store(tmp_path / "out")) == []


def test_an_existing_destination_is_refused_by_all(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    results = together(
        2,
        lambda processes: write_leaves(tmp_path / "out", [leaf([])], processes=processes),
    )
    assert all(isinstance(result, UsageError) for result in results), results
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_steps_wait_for_the_slowest(tmp_path: Path) -> None:
    log: list[str] = []

    def action(processes: Processes) -> None:
        for step in ("one", "two"):
            with processes.step(step):
                if processes.index == 1:
                    threading.Event().wait(0.05)
                log.append(step)

    together(3, action)
    assert log == ["one"] * 3 + ["two"] * 3
