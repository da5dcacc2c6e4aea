"""Finds tables of experts by token that name an expert twice, which implementations understand differently."""

from __future__ import annotations

import numpy as np

from dsv4_convert.store.reader import Store

_TABLE = "layers.{}.ffn.gate.tid2eid"


def repeated_experts(store: Store) -> list[str]:
    """One line for each table of a converted checkpoint with such rows; reads these tables, of a few MB each.

    Raises:
        BadInput: a table cannot be read.
    """
    found = []
    for path in store.paths:
        if store.manifest.leaves[path].rule != _TABLE:
            continue
        rows = np.sort(store.read(path).astype(np.int64), axis=-1)
        if repeated := int((np.diff(rows, axis=-1) == 0).any(axis=-1).sum()):
            count = rows[..., 0].size
            found.append(
                f"{path}: {repeated:,} of {count:,} rows name an expert twice; dsv4 and transformers add it twice, the "
                "published code once"
            )
    return found
