"""Orbax's own files in a checkpoint, which make a folder of arrays one that every Orbax restores.

They are what Orbax writes for a tree of NumPy arrays in nested dictionaries, without OCDBT and with Zarr 2: the
contents are compared byte for byte in ``tests/contracts/test_orbax.py``. To write them here takes no time; to import
Orbax, and JAX with it, takes as long as the conversion of some gigabytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

#: How Orbax says that a key of the tree is one of a dictionary.
_DICT_KEY = 2
_NUMPY_ARRAY = {"value_type": "np.ndarray", "skip_deserialize": False}


def orbax_files(paths: Iterable[str]) -> dict[str, bytes]:
    """The files by name, for the leaves at these dotted paths.

    Times are left out, which are optional to Orbax, so that the same conversion gives the same bytes.
    """
    return {
        "_CHECKPOINT_METADATA": _encoded(
            {
                "item_handlers": "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler",
                "metrics": {},
                "performance_metrics": {},
                "init_timestamp_nsecs": None,
                "commit_timestamp_nsecs": None,
                "custom_metadata": {},
            }
        ),
        "_METADATA": _encoded(
            {
                # In the order of the tree, whose dictionaries JAX sorts.
                "tree_metadata": {str(keys): _leaf(keys) for keys in sorted(tuple(path.split(".")) for path in paths)},
                "use_ocdbt": False,
                "use_zarr3": False,
                "store_array_data_equal_to_fill_value": True,
                "custom_metadata": None,
            }
        ),
        # Where a folder cannot be renamed, as in a bucket, Orbax takes a checkpoint without this file for unfinished.
        "commit_success.txt": b"Checkpoint commit was successful\n",
    }


def _leaf(keys: tuple[str, ...]) -> dict[str, Any]:
    return {
        "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in keys],
        "value_metadata": _NUMPY_ARRAY,
    }


def _encoded(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode()
