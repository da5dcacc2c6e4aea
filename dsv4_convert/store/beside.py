"""Finds what a checkpoint's manifest does not account for: other readers may take it for a part of the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dsv4_convert.errors import BadInput
from dsv4_convert.files.strict_json import parse_object
from dsv4_convert.store.arrays import METADATA_KEYS, StoredArray, is_local
from dsv4_convert.store.layout import ARRAY_METADATA_FILE, MANIFEST_FILE, chunk_file
from dsv4_convert.store.reader import Store


def unaccounted(store: Store) -> list[str]:
    """One line for everything that the manifest does not account for; none if there is nothing.

    That is: files and folders beside the leaves, files beside a leaf's chunks, entries of a leaf's own description that
    mean nothing to this store, and links that lead out of the folder. In a bucket only what is beside the leaves.
    """
    return [*_beside_the_leaves(store), *(_in_the_leaves(store) if is_local(store.folder) else ())]


def _beside_the_leaves(store: Store) -> Iterator[str]:
    expected = {*store.paths, *store.manifest.files, MANIFEST_FILE}
    found = {entry.name for entry in store.folder.iterdir()}
    yield from (f"{name}: in the folder, but not in the manifest" for name in sorted(found - expected))


def _in_the_leaves(store: Store) -> Iterator[str]:
    root = store.folder.resolve()
    yield from _links(store.folder, root)
    for path in store.paths:
        folder = store.folder / path
        try:
            stored = StoredArray.open(folder)
            document = parse_object((folder / ARRAY_METADATA_FILE).read_bytes(), where=path)
        except (BadInput, OSError):
            continue  # what is wrong with it is a difference, which verifying reports
        if extra := sorted(document.keys() - METADATA_KEYS):
            yield f"{path}/{ARRAY_METADATA_FILE}: entries that mean nothing here: {', '.join(extra)}"
        expected = {ARRAY_METADATA_FILE, *map(chunk_file, stored.layout.chunk_indices())}
        found = {entry.name for entry in folder.iterdir()}
        yield from (f"{path}/{name}: in the folder, but no chunk" for name in sorted(found - expected))
        yield from _links(folder, root)


def _links(folder: Path, root: Path) -> Iterator[str]:
    """Entries of a folder that are links out of the checkpoint."""
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() and not entry.resolve().is_relative_to(root):
            yield f"{entry}: a link to {entry.resolve()}, outside of the folder"
