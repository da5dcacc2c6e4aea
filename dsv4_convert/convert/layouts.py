"""``--layout``: whose parameter tree the store has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dsv4_convert.convert.storage import (
    CHUNK_BYTES,
    Form,
    StoredLeaf,
    decoded_dtype,
    is_transposed,
    stored_leaves,
)
from dsv4_convert.errors import UsageError
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.conversion import Layout, Storage
from dsv4_convert.spec.coverage import Leaf, Stored
from dsv4_convert.spec.maxtext import Target, targets
from dsv4_convert.spec.maxtext_config import FILE, model_file
from dsv4_convert.spec.names import Transform


def lay_out(
    layout: Layout,
    leaves: Sequence[Leaf],
    storage: Storage,
    stored: Mapping[str, Stored],
    config: Config,
    *,
    layers: Sequence[int],
    chunk_bytes: int = CHUNK_BYTES,
) -> list[StoredLeaf]:
    """The store's leaves for these parameters.

    Raises:
        UsageError: MaxText's tree of published bytes, of some layers only, or of layers that it cannot scan.
    """
    if layout is Layout.DSV4:
        return [stored_leaf for leaf in leaves for stored_leaf in stored_leaves(leaf, storage, stored, chunk_bytes)]
    if storage is Storage.SOURCE:
        raise UsageError(f"--layout {layout}: MaxText reads numbers, not --dtype source; give bfloat16 or float32")
    if len(layers) != config.num_hidden_layers:
        raise UsageError(f"--layout {layout}: MaxText's tree has all layers; leave --layers out")
    by_path = {leaf.path: leaf for leaf in leaves}
    found = targets(config, scanned=layout is Layout.MAXTEXT)
    return list(_maxtext(found, by_path, storage, stored, chunk_bytes))


def layout_files(layout: Layout, config: Config) -> dict[str, bytes]:
    """Files beside the checkpoint that only this layout has, by name."""
    return {} if layout is Layout.DSV4 else {FILE: model_file(config, scanned=layout is Layout.MAXTEXT)}


def _maxtext(
    found: Iterator[Target],
    by_path: Mapping[str, Leaf],
    storage: Storage,
    stored: Mapping[str, Stored],
    chunk_bytes: int,
) -> Iterator[StoredLeaf]:
    for target in found:
        shape = target.shape
        if not target.paths:
            yield StoredLeaf(target.path, (), Form.ONES, np.dtype(np.float32), shape, shape, 0)
            continue
        leaves = tuple(by_path[path] for path in target.paths)
        leaf = leaves[0]
        natural = decoded_dtype(leaf, storage, stored)
        dtype = np.dtype(target.row.dtype) if target.row.dtype else natural
        if target.scan_axis is None and not target.row.transposed and (shape, dtype) == (leaf.target_shape, natural):
            (stored_leaf,) = stored_leaves(leaf, storage, stored, chunk_bytes)
            yield dataclasses.replace(stored_leaf, path=target.path)
            continue
        first, last = target.rows or (0, leaf.source_shape[0])
        grouped = leaf.rule.transform is Transform.GROUPED
        chunk = list(shape)
        if target.scan_axis is not None:
            chunk[target.scan_axis] = 1
        if leaf.rule.per_expert or grouped:
            chunk[0] = 1
        yield StoredLeaf(
            target.path,
            leaves,
            Form.DECODED,
            dtype,
            shape,
            tuple(chunk),
            rows_per_chunk=shape[-1] if grouped else last - first,
            first_row=first,
            row_axis=0 if grouped else None,
            layer_axis=target.scan_axis,
            transposed=target.row.transposed or is_transposed(leaf),
        )
