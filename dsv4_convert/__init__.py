"""dsv4: DeepSeek-V4 from a Hugging Face checkpoint to Orbax and JAX, and the proof that it is right.

What a user of the library needs is imported from here; every name is loaded when it is first used, so that importing
the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4_convert.config import Config
    from dsv4_convert.convert import Storage, hf_to_orbax
    from dsv4_convert.model import Model
    from dsv4_convert.restore import Weights, restore_model

__all__ = ["Config", "Model", "Storage", "Weights", "__version__", "hf_to_orbax", "restore_model"]

_HOMES = {
    "Config": "dsv4_convert.config",
    "Model": "dsv4_convert.model",
    "Storage": "dsv4_convert.convert",
    "Weights": "dsv4_convert.restore",
    "hf_to_orbax": "dsv4_convert.convert",
    "restore_model": "dsv4_convert.restore",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("dsv4")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
