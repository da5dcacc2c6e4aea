"""Kill, fail and interrupt a command at its events; what must hold afterwards, every time."""

from __future__ import annotations

import dataclasses
import errno
import re
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tests.kills.runs import Ended, Fault, Zygote
from tests.kills.shim import Action
from tests.kills.subjects import Subject, fresh

#: Phrases that tell the user how to go on.
_WAY_OUT = re.compile(
    r"run the same command again|make room|choose another|fix the cause|check its permissions|remove it yourself"
)
#: Errors that a full, failing or read-only disk gives to each kind of call.
_ERRORS = {
    "open": (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EROFS),
    "mkdir": (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EROFS),
    "rename": (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EROFS),
    "link": (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EROFS),
    "symlink": (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EROFS),
    "unlink": (errno.EIO, errno.EACCES, errno.EROFS),
    "rmdir": (errno.EIO, errno.EACCES, errno.EROFS),
    "chmod": (errno.EIO, errno.EROFS),
    "utime": (errno.EIO, errno.EROFS),
}
_OF_FILES = (errno.ENOSPC, errno.EIO, errno.EDQUOT)


@dataclasses.dataclass(frozen=True)
class Event:
    """A call of an uninterrupted run: its number from 1, its name, and the file's path without what is numbered."""

    number: int
    call: str
    place: str


@dataclasses.dataclass
class Tally:
    """The attempts at one subject.

    Attributes:
        counts: numbers of points killed, faults injected, and so on.
        failures: one line per failure.
    """

    subject: str
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    failures: list[str] = dataclasses.field(default_factory=list)

    def fail(self, what: object, ended: Ended | None = None) -> None:
        """Note a failure."""
        self.failures.append(f"{self.subject}: {what}" + ("" if ended is None else f"\n{ended}"))


class Sweep:
    """One subject, its uninterrupted run, and what is done to it."""

    def __init__(self, zygote: Zygote, subject: Subject, inputs: Path, root: Path) -> None:
        """Run it once, uninterrupted.

        Args:
            zygote: runs the commands.
            subject: what to run.
            inputs: what :func:`~tests.kills.subjects.make_inputs` made.
            root: folder to work in; emptied before every run.
        """
        self.tally = Tally(subject.name)
        self._zygote, self._subject, self._inputs, self._root = zygote, subject, inputs, root
        log = root.with_name(root.name + ".log")
        whole = zygote.run(fresh(root), subject.command(inputs, root), log=log)
        assert whole.code == 0, whole
        self.seconds = whole.seconds
        self.whole = subject.content(root)
        assert self.whole
        self.events = list(_events(log, root))
        assert len(self.events) == whole.seen
        left = {path.name for path in root.iterdir()} - {subject.out(root).name}
        assert not left, f"{subject.name} leaves {left}"

    def sites(self) -> list[Event]:
        """The first and the last event of every kind of call at every kind of file."""
        first: dict[tuple[str, str], Event] = {}
        last: dict[tuple[str, str], Event] = {}
        for event in self.events:
            first.setdefault((event.call, event.place), event)
            last[event.call, event.place] = event
        return sorted({*first.values(), *last.values()}, key=lambda event: event.number)

    def spread(self, count: int) -> list[Event]:
        """At least ``count`` events, if there are so many: all of :meth:`sites`, and others evenly spread."""
        chosen = {event.number: event for event in self.sites()}
        others = [event for event in self.events if event.number not in chosen]
        missing = min(max(count - len(chosen), 0), len(others))
        for number in range(missing):
            event = others[number * len(others) // missing]
            chosen[event.number] = event
        return [chosen[number] for number in sorted(chosen)]

    def kill(self, points: Iterable[Event], *, acceptors: int = 1, turn: int = 0) -> None:
        """SIGKILL at events, before the call and in the midst of it in turn.

        Args:
            points: where.
            acceptors: at every how many points everything that might accept the destination is asked.
            turn: 1 for in the midst first.
        """
        for number, event in enumerate(points):
            action = (Action.KILL, Action.TORN)[(number + turn) % 2]
            ended = self._run(Fault(event.number, action))
            what = f"{action.name} at {event}"
            if ended.code == 0 and ended.seen < event.number:
                # Threads side by side sometimes make one call less, and this run did not reach the last event.
                self._finish(what, ask=False)
                continue
            if ended.code != -signal.SIGKILL:
                self.tally.fail(f"{what}: not killed", ended)
                continue
            self._after_kill(what, ask=number % acceptors == 0)

    def kill_at_times(self, count: int) -> None:
        """SIGKILL at moments spread over the time that the command takes."""
        for number in range(count):
            after = self.seconds * (number + 0.5) / count
            ended = self._run(Fault(), signals=[(after, signal.SIGKILL)])
            if ended.code == -signal.SIGKILL:
                self._after_kill(f"SIGKILL after {after:.3f} s", ask=True)
            elif ended.code:
                self.tally.fail(f"before SIGKILL after {after:.3f} s", ended)

    def _after_kill(self, what: str, *, ask: bool) -> None:
        self.tally.counts["killed"] += 1
        self._finish(what, ask=ask)

    def fail(self, points: Iterable[Event], *, errors: int = 1, lasting: bool = False) -> None:
        """Let single calls fail.

        Args:
            points: which.
            errors: with how many of the errors that such a call can give, one run each.
            lasting: every later change fails as well.
        """
        action = Action.FAIL_FROM if lasting else Action.FAIL
        for number, event in enumerate(points):
            possible = _ERRORS.get(event.call, _OF_FILES)
            for turn in range(min(errors, len(possible))):
                value = possible[(number + turn) % len(possible)]
                what = f"{errno.errorcode[value]}{' from here on' if lasting else ''} at {event}"
                ended = self._run(Fault(event.number, action, value))
                self.tally.counts["faults"] += 1
                self._check_refusal(what, ended)

    def limit_file_size(self, nbytes: int) -> None:
        """No file may be larger: what a quota looks like to the writer."""
        ended = self._run(Fault(file_size=nbytes))
        self.tally.counts["faults"] += 1
        if ended.code == 0:
            self.tally.fail(f"RLIMIT_FSIZE {nbytes}: no file was that large")
        self._check_refusal(f"RLIMIT_FSIZE {nbytes}", ended)

    def _check_refusal(self, what: str, ended: Ended) -> None:
        """Exit code 4 and a message that leads on, or all of it in spite of the fault; then finish."""
        if ended.code == 0:
            self.tally.counts["survived"] += 1
            if self._subject.content(self._root) != self.whole:
                self.tally.fail(f"{what}: said to be done, with other bytes", ended)
                return
        elif ended.code != 4:
            self.tally.fail(f"{what}: exit code 4 expected", ended)
        elif str(self._root) not in ended.err or not _WAY_OUT.search(ended.err.replace("\n", " ")):
            self.tally.fail(f"{what}: names no file, or no way out", ended)
        if "Traceback" in ended.err or ended.left:
            self.tally.fail(f"{what}: a traceback, or left behind: {ended.left}", ended)
        self._finish(what, ask=False)

    def interrupt(self, points: Iterable[Event], numbers: Sequence[int] = (signal.SIGINT, signal.SIGTERM)) -> None:
        """SIGINT and SIGTERM in turn."""
        for number, event in enumerate(points):
            sent = numbers[number % len(numbers)]
            ended = self._run(Fault(event.number, Action.SIGNAL, sent))
            self.tally.counts["signals"] += 1
            what = f"{signal.Signals(sent).name} at {event}"
            if ended.code != 130 and not (ended.code == 0 and self._subject.content(self._root) == self.whole):
                self.tally.fail(f"{what}: exit code 130 expected", ended)
            if ended.code == 130 and "with the same command" not in ended.err:
                self.tally.fail(f"{what}: does not say how to go on", ended)
            if "Traceback" in ended.err or ended.left:
                self.tally.fail(f"{what}: a traceback, or left behind: {ended.left}", ended)
            self._finish(what, ask=False)

    def two_at_once(self, at: int) -> None:
        """A second run while the first stands still, which then goes on. Another time the first is killed."""
        arguments = self._subject.command(self._inputs, fresh(self._root))
        with self._zygote.held(self._root, arguments, at) as first:
            second = self._zygote.run(self._root, arguments, timeout=20)
            if second.code != 4 or "another process" not in second.err or "Traceback" in second.err:
                self.tally.fail(f"a second run at event {at}: refusal expected", second)
            ended = first.end(signal.SIGCONT)
        self.tally.counts["two at once"] += 1
        if ended.code != 0 or self._subject.content(self._root) != self.whole:
            self.tally.fail(f"the first of two runs, held at event {at}", ended)
        arguments = self._subject.command(self._inputs, fresh(self._root))
        with self._zygote.held(self._root, arguments, at) as first:
            first.end(signal.SIGKILL)
        self._finish(f"killed while it held the lock, event {at}", ask=False)

    def _run(self, fault: Fault, *, signals: Sequence[tuple[float, int]] = ()) -> Ended:
        root = fresh(self._root)
        return self._zygote.run(root, self._subject.command(self._inputs, root), fault, signals=signals)

    def _finish(self, what: str, *, ask: bool) -> None:
        """The destination is absent, resumable or whole; the same command again makes it whole, with the same bytes."""
        subject, root = self._subject, self._root
        before = subject.content(root)
        done = before == self.whole
        if before is not None and not done and subject.appears:
            self.tally.counts["half-done accepted"] += 1
            self.tally.fail(f"{what}: something else than the whole is at the destination")
        check = None
        if ask and not done:
            self.tally.counts["acceptors asked"] += 1
            check = (subject.acceptor, [path for path in subject.half(root) if path.exists()] or subject.half(root))
        again = self._zygote.run(root, subject.command(self._inputs, root), check=check)
        if again.check:
            self.tally.counts["half-done accepted"] += 1
            self.tally.fail(f"{what}: accepted: {again.check}")
        refused = done and subject.appears and again.code == 2 and "exists already" in again.err
        if again.code and not refused:
            self.tally.fail(f"{what}: the same command again", again)
        elif subject.content(root) != self.whole:
            self.tally.fail(f"{what}: other bytes after the same command again", again)
        else:
            self.tally.counts["identical"] += 1
        left = {path.name for path in root.iterdir()} - {subject.out(root).name}
        if left and not refused:
            self.tally.fail(f"{what}: left behind after the same command again: {sorted(left)}")


def _events(log: Path, root: Path) -> Iterator[Event]:
    """The shim's log."""
    for line in log.read_text(encoding="utf-8").splitlines():
        number, call, path = line.split(" ", 2)
        place = path.removeprefix(str(root))
        place = re.sub(r"(?<=/leaves/|\Dcommit/)[^/]+(?=/)", "LEAF", place)
        place = re.sub(r"(orbax-checkpoint-tmp/)[a-z][^/]+$", r"\1LEAF", place)
        place = re.sub(r"/leaves/[^/]+$", "/leaves/LEAF", place)
        place = re.sub(r"probe-[^/]+", "probe", place)
        place = re.sub(r"\d+(\.\d+)*|[0-9a-f]{20,}|[A-Za-z0-9_=-]{20,}(?=\.)", "N", place)
        yield Event(int(number), call, place)
