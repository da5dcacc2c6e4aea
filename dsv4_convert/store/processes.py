"""Several processes that write one checkpoint together: who they are, and how they wait for each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from dsv4_convert.errors import ResourceError

#: A process waits this long for the slowest one, in milliseconds. One that died is noticed by JAX's own heartbeat.
_PATIENCE_MS = 7 * 24 * 3600 * 1000


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

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Run the block, then wait until every process has run its own. A failure of one is a failure of all.

        Raises:
            ResourceError: another process failed; its message is passed on.
        """
        if self.service is None:
            yield
            return
        key = f"dsv4/{next(self._steps)}/{name}"
        try:
            yield
        except BaseException as error:
            self.service.key_value_set(f"{key}/{self.index}", f"{type(error).__name__}: {error}")
            raise
        self.service.key_value_set(f"{key}/{self.index}", "")
        for other in range(self.count):
            failure = self.service.blocking_key_value_get(f"{key}/{other}", _PATIENCE_MS)
            if failure:
                raise ResourceError(f"process {other} of {self.count} failed in step {name!r}: {failure}")


ALONE = Processes()
