"""Making a compact golden of a whole one, without the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from dsv4_convert.errors import UsageError
from dsv4_convert.golden.archive import Golden
from dsv4_convert.golden.compact import Compact
from dsv4_convert.golden.writer import check_destination, golden_writer


def shrink(
    golden: Golden,
    out: Path,
    compact: Compact,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Golden:
    """Write the compact golden that ``golden record`` would have made with ``compact``: the same in every byte.

    Layer by layer, taking up what an interrupted call of the same finished. ``progress`` is called before each layer
    and the model level, with finished steps, all steps, and the next one in words.

    Raises:
        UsageError: the destination exists, or ``golden`` is compact already.
        BadInput: an array of ``golden`` is not what was recorded.
        ResourceError: the disk is full or cannot be written to, or another process writes the same.
    """
    if golden.compact is not None:
        raise UsageError(f"{golden.path}: compact already; make the other one from a whole golden")
    check_destination(out)
    request = dataclasses.replace(golden.manifest.request, compact=compact)
    with golden_writer(out, request) as writer:
        for done, part in enumerate(writer.parts):
            progress(done, len(writer.parts), request.config.step(part))
            if part not in writer.finished and not writer.complete:
                writer.write(part, request.keep(golden.everything(part)))
        return writer.publish()
