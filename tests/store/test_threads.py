"""The worker threads: order, bounds, failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from dsv4_convert.store.threads import in_threads


def results_of(work: Callable[[int], Any], tasks: Iterable[int], workers: int) -> dict[int, Any]:
    with in_threads(work, tasks, workers=workers) as done:
        return dict(done)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_task_is_done_once_and_begun_in_order(workers: int) -> None:
    begun: list[int] = []

    def tasks():
        for task in range(100):
            begun.append(task)
            yield task

    with in_threads(lambda task: task * task, tasks(), workers=workers) as done:
        results = list(done)
    assert begun == list(range(100))
    assert sorted(results) == [(task, task * task) for task in range(100)]


def test_tasks_run_at_the_same_time_but_no_more_than_the_workers() -> None:
    meeting = threading.Barrier(3, timeout=10)  # passes only if three tasks run at once
    taken: list[int] = []
    finished: list[int] = []

    def tasks():
        for task in range(6):
            taken.append(task)
            assert len(taken) - len(finished) <= 3
            yield task

    def work(task: int) -> None:
        meeting.wait()
        finished.append(task)

    assert results_of(work, tasks(), 3).keys() == set(range(6))


def test_tasks_are_taken_one_at_a_time() -> None:
    alone = threading.Lock()

    def tasks():
        for task in range(20):
            assert alone.acquire(blocking=False), "two threads at once"
            time.sleep(0.001)
            alone.release()
            yield task

    results_of(lambda task: task, tasks(), 4)


@pytest.mark.parametrize("place", ["task", "work", "block"])
def test_a_failure_stops_the_rest_and_is_raised(place: str) -> None:
    worked: list[int] = []

    def fail_at_five(task: int, here: str) -> None:
        if here == place and task == 5:
            raise RuntimeError(place)

    def tasks():
        for task in range(100_000):
            fail_at_five(task, "task")
            yield task

    def work(task: int) -> None:
        fail_at_five(task, "work")
        worked.append(task)

    def block() -> None:
        with in_threads(work, tasks(), workers=2) as done:
            for task, _ in done:
                fail_at_five(task, "block")

    with pytest.raises(RuntimeError, match=place):
        block()
    assert len(worked) < 100_000
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dsv4-store")]


@pytest.mark.parametrize("failing", [0, 1])
def test_the_first_failure_in_time_is_raised(failing: int) -> None:
    """One task fails while another waits, which is then told to stop and fails too: whichever thread has which."""
    waiting, stopped = threading.Event(), threading.Event()

    class Source:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            stopped.set()

    def work(task: int) -> None:
        if task == failing:
            assert waiting.wait(10)
            raise OSError("disk full")
        waiting.set()
        assert stopped.wait(10)
        raise RuntimeError("stopped")

    with pytest.raises(OSError, match="disk full"), in_threads(work, [0, 1], workers=2) as done, Source():
        list(done)
