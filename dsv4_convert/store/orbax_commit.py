"""Let Orbax turn finished array folders into one of its checkpoints.

Orbax writes its own metadata for a tree of stand-in leaves. A type handler moves each finished folder to the leaf's
place in the checkpoint, so no array passes through memory. The result is an ordinary checkpoint of NumPy arrays without
OCDBT, which any Orbax restores without dsv4.

This module relies on the following parts of Orbax, checked with 0.12.4 to 0.12.8. ``tests/contracts/test_orbax.py``
fails if one changes:

- public: ``Checkpointer``, ``PyTreeCheckpointHandler`` with ``use_ocdbt``, ``use_zarr3``, ``type_handler_registry`` and
  ``enable_pinned_host_transfer``, ``args.PyTreeSave``, ``type_handlers.TypeHandler`` and
  ``type_handlers.create_type_handler_registry``, ``options.MultiprocessingOptions`` and ``multihost.process_index``;
- ``TypeHandler.serialize`` gets ``ParamInfo`` objects with ``await_path_creation()``, ``name`` and ``path``;
- the type string ``np.ndarray``, which makes a plain restore use Orbax's own NumPy handler;
- that handler reads ``<path>/.zarray`` and its chunks, whatever the chunk shape.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp  # type: ignore[import-untyped]

from dsv4_convert.files.writing import writing
from dsv4_convert.store.layout import nested


@dataclass(frozen=True)
class _FinishedArray:
    """A leaf of the tree that Orbax is asked to save: only the folder where the array already lies."""

    folder: Path


class _MovingHandler(ocp.type_handlers.TypeHandler):  # type: ignore[misc]  # Orbax is untyped
    """Saves a :class:`_FinishedArray` by renaming its folder. Never restores: Orbax's NumPy handler does."""

    def typestr(self) -> str:
        return "np.ndarray"

    async def serialize(
        self, values: Sequence[_FinishedArray], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            os.rename(value.folder, os.fspath(info.path))
        return []

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[Any]:
        raise NotImplementedError("only used for saving")

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        raise NotImplementedError("only used for saving")


def commit_arrays(folders: Mapping[str, Path], directory: Path) -> None:
    """Make ``directory`` an Orbax checkpoint of the arrays in ``folders``, which are moved into it.

    Args:
        folders: folder of every array by the dotted path of its leaf; on the same file system as ``directory``.
        directory: absent so far. Orbax works in ``directory`` plus a suffix and renames that at the end; after an
            interruption both may hold some of the folders.

    Raises:
        ResourceError: the disk is full or failing.
    """
    tree = nested({path: _FinishedArray(folder) for path, folder in folders.items()})
    with writing(directory), _nothing_logged():
        registry = ocp.type_handlers.create_type_handler_registry((_FinishedArray, _MovingHandler()))
        # This process alone, although others may have written some of the arrays.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=ocp.multihost.process_index(),
            active_processes={ocp.multihost.process_index()},
            barrier_sync_key_prefix="dsv4",
        )
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False,
            use_zarr3=False,
            type_handler_registry=registry,
            enable_pinned_host_transfer=False,
            multiprocessing_options=alone,
        )
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(tree))
        _forget_when_and_where(directory)


def _forget_when_and_where(directory: Path) -> None:
    """Take times and paths out of Orbax's own files, so that the same conversion gives the same bytes anywhere."""
    file = directory / "_CHECKPOINT_METADATA"
    metadata = json.loads(file.read_text(encoding="utf-8"))
    metadata |= {"init_timestamp_nsecs": None, "commit_timestamp_nsecs": None}  # both are optional to Orbax
    file.write_text(json.dumps(metadata), encoding="utf-8")
    marker = directory / "commit_success.txt"
    if marker.exists():  # Orbax only checks that it exists
        marker.write_text("Checkpoint commit was successful\n", encoding="utf-8")


@contextmanager
def _nothing_logged() -> Iterator[None]:
    """Keep off the terminal what Orbax logs: warnings about OCDBT and array metadata, not used here, and
    what it raises as well, with a traceback."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
