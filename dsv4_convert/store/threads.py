"""Work through a sequence of tasks in several threads, with nothing queued."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


@contextmanager
def in_threads(
    work: Callable[[Task], Result], tasks: Iterable[Task], *, workers: int
) -> Iterator[Iterator[tuple[Task, Result]]]:
    """Call ``work`` on every task in ``workers`` threads; gives an iterator over (task, result) as they end.

    Each thread takes the next task when it is free, so at most ``workers`` tasks are under way. One thread at a time
    takes a task. The iterator raises the first failure in time. Leaving the block, for whatever reason, lets no further
    task begin and waits for those under way; so a block nested in it may end what they wait for::

        with in_threads(read, shards, workers=4) as done, stopped_at_the_end(source):
            for shard, content in done:
                ...
    """
    upcoming, taking, leaving = iter(tasks), threading.Lock(), threading.Event()
    #: A task with its result, a failure, or None when a thread ends.
    outcomes: SimpleQueue[tuple[Task, Result] | BaseException | None] = SimpleQueue()

    def run() -> None:
        try:
            while not leaving.is_set():
                with taking:
                    try:
                        task = next(upcoming)
                    except StopIteration:
                        break
                outcomes.put((task, work(task)))
        except BaseException as error:
            outcomes.put(error)
        else:
            outcomes.put(None)

    def done() -> Iterator[tuple[Task, Result]]:
        running = workers
        while running:
            match outcomes.get():
                case None:
                    running -= 1
                case BaseException() as failure:
                    raise failure
                case outcome:
                    yield outcome

    with ThreadPoolExecutor(workers, thread_name_prefix="dsv4-store") as pool:
        try:
            for _ in range(workers):
                pool.submit(run)
            yield done()
        finally:
            leaving.set()
