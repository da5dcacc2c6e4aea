"""Progress of a conversion that may take hours: a bar in a terminal, a line of JSON now and then anywhere else."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dsv4_convert.cli.common import console, plain
from dsv4_convert.cli.status import noting_compilations, status, what_column
from dsv4_convert.show.units import duration, size

if TYPE_CHECKING:
    from dsv4_convert.convert import Advance

#: Columns from which on there is room for a bar.
_ROOMY = 75
#: Seconds between two lines where stderr is no terminal.
LINE_EVERY = 30.0


@dataclass
class SpeedMeter:
    """Rates since the start of this run, without the work of an interrupted one."""

    clock: Callable[[], float] = time.monotonic
    begun: float = field(init=False)
    first: Advance | None = None

    def __post_init__(self) -> None:
        self.begun = self.clock()

    def reading(self, now: Advance) -> dict[str, object]:
        """Everything that there is to say, for machines; rates in bytes per second, times in seconds."""
        if self.first is None:
            self.first = now
        seconds = self.clock() - self.begun
        read, written = now.read - self.first.read, now.written - self.first.written
        rate_in, rate_out = (count / seconds if seconds > 0 else 0.0 for count in (read, written))
        left = now.to_write - now.written
        return {
            "event": "progress",
            "seconds": round(seconds, 1),
            "read_bytes": now.read,
            "to_read_bytes": now.to_read,
            "written_bytes": now.written,
            "to_write_bytes": now.to_write,
            "fetched_bytes": now.fetched,
            "read_rate": round(rate_in),
            "write_rate": round(rate_out),
            "eta_seconds": round(left / rate_out) if rate_out else None,
            "at": now.path,
            "memory_bytes": resident_bytes(),
        }


def resident_bytes() -> int:
    """Memory of this process now; its peak where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def conversion_progress() -> Iterator[Callable[[Advance], None]]:
    """Show how far a conversion is, on stderr."""
    screen = console(err=True)
    meter = SpeedMeter()
    if not screen.is_terminal:
        yield _lines(meter)
        return
    if plain():
        with status("convert") as say:
            yield lambda now: say(_sentence(meter.reading(now)))
        return
    from rich.progress import BarColumn, Progress, TextColumn

    bars = (BarColumn(bar_width=20),) if screen.width >= _ROOMY else ()
    what = what_column()
    columns = (TextColumn("{task.percentage:>3.0f}%"), *bars, what)
    with Progress(*columns, console=screen, transient=True) as bar, noting_compilations(what):
        task = bar.add_task("starting", total=None)

        def show(now: Advance) -> None:
            reading = meter.reading(now)
            bar.update(task, completed=now.written, total=now.to_write, description=_sentence(reading))

        yield show


def _lines(meter: SpeedMeter) -> Callable[[Advance], None]:
    last = meter.begun

    def show(now: Advance) -> None:
        nonlocal last
        reading = meter.reading(now)
        if meter.clock() - last >= LINE_EVERY:
            last = meter.clock()
            print(json.dumps(reading), file=sys.stderr, flush=True)

    return show


def _sentence(reading: dict[str, object]) -> str:
    """``layers.12  in 0.21 GB/s  out 0.77 GB/s  left 0:12:40  memory 0.6 GB``, short enough for 80 columns."""
    eta = reading["eta_seconds"]
    at = str(reading["at"]).split(".")
    where = ".".join(at[:2]) if at[0] == "layers" else at[0]
    rate_in, rate_out, memory = (size(int(str(reading[key]))) for key in ("read_rate", "write_rate", "memory_bytes"))
    left = duration(float(str(eta))) if eta is not None else "-"
    fetched = reading["fetched_bytes"]
    if not where:
        return f"fetching, {size(int(str(fetched)))} so far" if fetched is not None else "starting"
    return f"{where}  in {rate_in}/s  out {rate_out}/s  left {left}  mem {memory}"
