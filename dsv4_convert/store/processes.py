"""Several processes that write one checkpoint together: their identity, and how they wait for each other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from dsv4_convert.errors import BadInput, CheckFailed, ResourceError, UsageError

#: A process waits this long for the slowest one, in milliseconds. JAX's own heartbeat notices a dead process.
_PATIENCE_MS = 7 * 24 * 3600 * 1000

#: The errors that one process reports to the others, by class name.
_ERRORS = {kind.__name__: kind for kind in (BadInput, CheckFailed, ResourceError, UsageError)}

Task = TypeVar("Task")


class KeyValues(Protocol):
    """What is used of JAX's coordination service."""

    def key_value_set(self, key: str, value: str) -> None:
        """Publish a value; a key is set once."""

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        """Wait for a value."""


@dataclass(frozen=True)
class Processes:
    """The processes that take part, seen from one of them. Every one takes the same steps in the same order."""

    index: int = 0
    count: int = 1
    service: KeyValues | None = None
    _steps: Iterator[int] = field(default_factory=itertools.count, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this one does what is done once."""
        return self.index == 0

    def share(self, tasks: Sequence[Task], nbytes: Callable[[Task], int]) -> list[Task]:
        """The tasks of this process: neighbours with its part of the bytes, so that it reads a part of the source."""
        total = sum(map(nbytes, tasks)) or 1
        mine, before = [], 0
        for task in tasks:
            if min(before * self.count // total, self.count - 1) == self.index:
                mine.append(task)
            before += nbytes(task)
        return mine

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Run the block, then wait until every process has run its own. A failure of one is a failure of all.

        Raises:
            Dsv4Error: another process failed. Its message is passed on, and if it is one of ours its class, and so its
                exit code; any other is a :class:`ResourceError`.
        """
        if self.service is None:
            yield
            return
        step = next(self._steps)
        try:
            yield
        except BaseException as error:
            self._tell_failure(step, error)
            raise
        self.service.key_value_set(self._key(step, self.index), "")
        for other in range(self.count):
            failure = self.service.blocking_key_value_get(self._key(step, other), _PATIENCE_MS)
            if failure:
                kind, _, message = failure.partition(": ")
                known = _ERRORS.get(kind)
                what = f"process {other} of {self.count} failed in step {name!r}"
                raise ResourceError(f"{what}: {failure}") if known is None else known(f"{what}: {message}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block of steps. A failure between two steps counts as a failure of the next, which tells the others."""
        try:
            yield
        except BaseException as error:
            self._tell_failure(next(self._steps), error)
            raise

    def _tell_failure(self, step: int, error: BaseException) -> None:
        # If the service is gone, so are the others; the error itself is what counts.
        if self.service is not None:
            with suppress(Exception):
                self.service.key_value_set(self._key(step, self.index), f"{type(error).__name__}: {error}")

    @staticmethod
    def _key(step: int, index: int) -> str:
        return f"dsv4/{step}/{index}"


ALONE = Processes()
