"""Everything that a sweep needs, set up once: folders in memory, a loopback Hub, the prepared process, the inputs."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.checkpoint.hub_server import LoopbackHub
from tests.kills.runs import Zygote, zygote
from tests.kills.subjects import COMMIT, REPOSITORY_NAME, Subject, make_inputs
from tests.kills.sweep import Sweep

#: A file system on which fsync is free: every run calls it hundreds of times.
_MEMORY = Path("/dev/shm")
_ENOUGH = 1 << 30


@dataclasses.dataclass(frozen=True)
class Workshop:
    """Attributes: the prepared process, what commands read, and a folder for each work."""

    zygote: Zygote
    inputs: Path
    folder: Path

    def sweep(self, subject: Subject) -> Sweep:
        """A sweep of one subject, in a folder of its own."""
        return Sweep(self.zygote, subject, self.inputs, self.folder / subject.name.replace(" ", "-"))


@contextmanager
def workshop(*, reference: bool) -> Iterator[Workshop]:
    """Set up.

    Args:
        reference: with torch and transformers: to record goldens, and to have transformers refuse folders.
    """
    with ExitStack() as held:
        roomy = _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > _ENOUGH
        temporary = tempfile.TemporaryDirectory(prefix="dsv4-kills-", dir=_MEMORY if roomy else None)
        folder = Path(held.enter_context(temporary))
        for name in ("own", "inputs", "work"):
            (folder / name).mkdir()
        hub = LoopbackHub()
        held.callback(hub.close)
        prepared = held.enter_context(zygote(folder / "own", reference=reference, endpoint=hub.endpoint))
        make_inputs(folder / "inputs", prepared, recorded=reference)
        files = {file.name: file.read_bytes() for file in (folder / "inputs" / "hf").iterdir()}
        hub.add(REPOSITORY_NAME, COMMIT, files)
        yield Workshop(prepared, folder / "inputs", folder / "work")
