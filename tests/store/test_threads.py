"""The worker threads: order, bounds, failures."""

from __future__ import annotations

import threading
import time

import pytest

from dsv4_convert.store.threads import work_through


@pytest.mark.parametrize("workers", [1, 3])
def test_every_task_is_done_once_and_begun_in_order(workers: int) -> None:
    begun: list[int] = []
    results: dict[int, int] = {}

    def tasks():
        for task in range(100):
            begun.append(task)
            yield task

    work_through(tasks(), lambda task: task * task, results.__setitem__, workers=workers)
    assert begun == list(range(100))
    assert results == {task: task * task for task in range(100)}


def test_tasks_run_at_the_same_time_but_no_more_than_the_workers() -> None:
    meeting = threading.Barrier(3, timeout=10)  # passes only if three tasks run at once
    taken: list[int] = []

    def tasks():
        for task in range(6):
            taken.append(task)
            assert len(taken) - len(finished) <= 3
            yield task

    finished: list[int] = []
    work_through(tasks(), lambda task: meeting.wait(), lambda task, _: finished.append(task), workers=3)
    assert sorted(finished) == list(range(6))


def test_tasks_are_taken_and_results_handed_over_one_at_a_time() -> None:
    alone = threading.Lock()

    def hold() -> None:
        assert alone.acquire(blocking=False), "two threads at once"
        time.sleep(0.001)
        alone.release()

    def tasks():
        for task in range(20):
            hold()
            yield task

    work_through(tasks(), lambda task: task, lambda task, _: hold(), workers=4)


@pytest.mark.parametrize("place", ["task", "work", "done"])
def test_a_failure_stops_the_rest_and_is_raised(place: str) -> None:
    worked: list[int] = []

    def fail_at_five(task: int, here: str) -> None:
        if here == place and task == 5:
            raise RuntimeError(place)

    def tasks():
        for task in range(10_000):
            fail_at_five(task, "task")
            yield task

    def work(task: int) -> None:
        fail_at_five(task, "work")
        worked.append(task)

    with pytest.raises(RuntimeError, match=place):
        work_through(tasks(), work, lambda task, _: fail_at_five(task, "done"), workers=2)
    assert len(worked) < 10_000
