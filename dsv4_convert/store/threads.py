"""Work through a sequence of tasks in several threads, with nothing queued."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def work_through(
    tasks: Iterator[Task],
    work: Callable[[Task], Result],
    done: Callable[[Task, Result], None],
    *,
    workers: int,
    stopping: Callable[[], None] = lambda: None,
) -> None:
    """Call ``work`` on every task, in ``workers`` threads, and then ``done`` with its result.

    Each thread takes the next task when it is free, so at most ``workers`` results exist at a time. Taking a task and
    ``done`` happen in one thread at a time. After a failure or an interrupt no task is begun any more; ``stopping`` is
    called, which may end what the tasks begun are waiting for, and these end first. The failure is raised here.
    """
    lock = threading.Lock()
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            with lock:
                try:
                    task = next(tasks)
                except StopIteration:
                    return
            result = work(task)
            with lock:
                done(task, result)

    with ThreadPoolExecutor(workers, thread_name_prefix="dsv4-store") as pool:
        threads = [pool.submit(run) for _ in range(workers)]
        try:
            wait(threads, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            if not all(thread.done() for thread in threads):
                stopping()
    for thread in threads:
        thread.result()
