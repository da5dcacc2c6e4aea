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
    from dsv4_convert.convert.to_hf import orbax_to_hf
    from dsv4_convert.converted import Weights
    from dsv4_convert.golden.archive import Golden, open_golden
    from dsv4_convert.golden.recorder import record as record_golden
    from dsv4_convert.model import Cache, Model
    from dsv4_convert.parity.activations import compare_activations
    from dsv4_convert.parity.run import run as run_parity
    from dsv4_convert.restore import restore_model

__all__ = [
    "Cache",
    "Config",
    "Golden",
    "Model",
    "Storage",
    "Weights",
    "__version__",
    "compare_activations",
    "hf_to_orbax",
    "open_golden",
    "orbax_to_hf",
    "record_golden",
    "restore_model",
    "run_parity",
]

#: Where the names are, and what they are called there if it is something else.
_HOMES = {
    "Cache": ("dsv4_convert.model", "Cache"),
    "Config": ("dsv4_convert.config", "Config"),
    "Golden": ("dsv4_convert.golden.archive", "Golden"),
    "Model": ("dsv4_convert.model", "Model"),
    "Storage": ("dsv4_convert.convert", "Storage"),
    "Weights": ("dsv4_convert.converted", "Weights"),
    "compare_activations": ("dsv4_convert.parity.activations", "compare_activations"),
    "hf_to_orbax": ("dsv4_convert.convert", "hf_to_orbax"),
    "open_golden": ("dsv4_convert.golden.archive", "open_golden"),
    "orbax_to_hf": ("dsv4_convert.convert.to_hf", "orbax_to_hf"),
    "record_golden": ("dsv4_convert.golden.recorder", "record"),
    "restore_model": ("dsv4_convert.restore", "restore_model"),
    "run_parity": ("dsv4_convert.parity.run", "run"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("dsv4-convert")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
