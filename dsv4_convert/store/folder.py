"""A local destination, and the stage beside it in which a checkpoint grows."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.files.limits import free_bytes, nearest_folder
from dsv4_convert.files.workspace import Workspace, require_writable, scratch_folder, stage_of
from dsv4_convert.files.writing import sync, writing
from dsv4_convert.folders import is_converted
from dsv4_convert.store.arrays import Array, ArrayWriter, Compression, StoredArray, create_array, write_file
from dsv4_convert.store.destination import ChunkWriter, timed_writes
from dsv4_convert.store.export_state import EXPORT_STATE
from dsv4_convert.store.journal import Journal
from dsv4_convert.store.layout import ARRAY_METADATA_FILE, MANIFEST_FILE, ArrayLayout, Index, chunk_file
from dsv4_convert.store.orbax_metadata import orbax_files

#: Every name in the stage of a conversion or an export; of earlier versions too.
_OWN = re.compile(r"lock|journal.*\.jsonl|journal\.new|leaves|commit.*|replaced|export\.json|export\.new")


class Folder:
    """A local destination, with the stage of a conversion or an export beside it::

        journal*.jsonl  the plan, then a line for every finished chunk and side record; one file for each process
        leaves/PATH/    arrays, finished or not
        commit*         the checkpoint until it is published
        export.json     of an export, whose shards grow in ``commit``: what is finished

    A kill at any moment leaves one of these states, and :meth:`prepare` leads every one of them back to "the chunks of
    the journal in ``leaves/``".
    """

    def __init__(self, target: Path) -> None:
        self.workspace = Workspace(target, _OWN, content="commit")
        self._target = target
        self._stage = self.workspace.stage
        self._leaves = self._stage / "leaves"

    @property
    def target(self) -> Path:
        return self._target

    def check(self, *, overwrite: bool) -> None:
        if not os.path.lexists(self._target):
            require_writable(self._target)
            return
        if not is_converted(self._target):
            raise UsageError(
                f"{self._target}: exists already, and is not a checkpoint that dsv4 converted (no {MANIFEST_FILE}), so "
                "it is never overwritten. Choose another destination, or remove it."
            )
        if not overwrite:
            raise UsageError(
                f"{self._target}: exists already, a finished conversion. --overwrite replaces it; or choose another "
                "destination."
            )

    def held(self) -> Workspace:
        return self.workspace

    def clear(self) -> None:
        self.workspace.clear()

    def prepare(self, layouts: Mapping[str, ArrayLayout], *, plan: Mapping[str, Any], compression: Compression) -> None:
        """As :meth:`~dsv4_convert.store.destination.Destination.prepare`.

        Raises:
            UsageError: an unfinished export is here; or as :meth:`Journal.open`.
            BadInput: as :meth:`Journal.open`.
            ResourceError: the disk is full or failing.
        """
        if os.path.lexists(self._stage / EXPORT_STATE):
            raise UsageError(
                f"{self._stage}: an unfinished export is here ({EXPORT_STATE}). Finish it with the same `dsv4 convert "
                "orbax-to-hf`, choose another destination, or --restart to discard it."
            )
        journal = Journal.open(self._stage, plan=plan)
        self._take_back_leaves()
        chunks: dict[str, dict[Index, str]] = {}
        for path, layout in layouts.items():
            kept = _reconcile(self._leaves / path, layout, compression, journal.chunks.get(path, {}))
            if kept:
                chunks[path] = kept
        journal.chunks = chunks
        journal.rewrite()

    def _take_back_leaves(self) -> None:
        """Undo an unfinished commit: arrays go back to ``leaves/``, the other files are removed."""
        with writing(self._stage):
            self._leaves.mkdir(exist_ok=True)
            for commit in self._stage.glob("commit*"):
                for entry in commit.iterdir():
                    if entry.is_dir() and not (self._leaves / entry.name).exists():
                        entry.rename(self._leaves / entry.name)
                shutil.rmtree(commit)

    def journal(self, plan: Mapping[str, Any], member: int) -> Journal:
        return Journal.open(self._stage, plan=plan, member=member)

    def writer(self, path: str, layout: ArrayLayout, compression: Compression) -> ChunkWriter:
        return ArrayWriter(self._leaves / path, layout, compression)

    @contextmanager
    def committing(self, paths: Iterable[str]) -> Iterator[Path]:
        content = self.workspace.content
        with writing(content):
            content.mkdir()
            for path in paths:
                sync(self._leaves / path)
                (self._leaves / path).rename(content / path)
        for name, data in orbax_files(paths).items():
            write_file(content / name, data)
        yield content
        with writing(self._leaves):
            self._leaves.rmdir()  # empty, for the arrays are in the content
        self.workspace.publish()

    def free(self) -> int | None:
        return free_bytes(self._target.parent) + staged_bytes(self._target)

    def device(self) -> int | None:
        return nearest_folder(self._target.parent).stat().st_dev

    def probe(self, chunk: Array, count: int, compression: Compression) -> tuple[float, int]:
        layout = ArrayLayout(shape=(count, *chunk.shape), dtype=chunk.dtype, chunk_shape=(1, *chunk.shape))
        with scratch_folder(nearest_folder(self._target.parent)) as scratch:
            create_array(scratch / "probe", layout, compression)
            seconds = timed_writes(ArrayWriter(scratch / "probe", layout, compression), layout.chunk_indices(), chunk)
            return seconds, sum(file.stat().st_size for file in (scratch / "probe").iterdir())


def _reconcile(
    folder: Path, layout: ArrayLayout, compression: Compression, digests: Mapping[Index, str]
) -> dict[Index, str]:
    """Find the chunks with these digests that are there; remove whatever else lies in the leaf's folder."""
    with writing(folder):
        if not folder.exists():
            create_array(folder, layout, compression)
            return {}
        try:
            stored = StoredArray.open(folder)
            intact = stored.layout == layout and stored.compression == compression
        except BadInput:
            intact = False
        if not intact:
            shutil.rmtree(folder)
            create_array(folder, layout, compression)
            return {}
        missing = set(stored.missing_chunks())
        kept = {index: digest for index, digest in digests.items() if chunk_file(index) not in missing}
        names = {ARRAY_METADATA_FILE, *map(chunk_file, kept)}
        for entry in folder.iterdir():
            if entry.name not in names:
                entry.unlink()
        return kept


def leaves_of(stage: Path) -> list[Path]:
    """The folders of the arrays that a conversion has in its stage, finished or not."""
    try:
        return sorted(Path(entry) for entry in os.scandir(stage / "leaves") if entry.is_dir())
    except FileNotFoundError:
        return []


def staged_bytes(destination: Path) -> int:
    """Bytes of the chunks that an interrupted run has left for ``destination``."""
    return sum(entry.stat().st_size for folder in leaves_of(stage_of(destination)) for entry in os.scandir(folder))
