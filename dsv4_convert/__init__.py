"""dsv4: DeepSeek-V4 from a Hugging Face checkpoint to Orbax and JAX, and the proof that it is right.

The public names of the library are imported from here. Each is loaded on first use, so importing the package costs
nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4_convert.checkpoint.hub import download
    from dsv4_convert.convert import ConversionOptions, hf_to_orbax
    from dsv4_convert.convert.to_hf import orbax_to_hf
    from dsv4_convert.convert.verification import verify
    from dsv4_convert.golden.archive import Golden, open_golden
    from dsv4_convert.golden.recorder import RecordingOptions
    from dsv4_convert.golden.recorder import record as record_golden
    from dsv4_convert.inspection import inspect
    from dsv4_convert.model import Cache, Model
    from dsv4_convert.parity.activations import compare_activations
    from dsv4_convert.parity.finished import FinishedSteps
    from dsv4_convert.parity.run import ParityOptions, run_parity
    from dsv4_convert.serve.generate import generate
    from dsv4_convert.spec.config import Config
    from dsv4_convert.spec.conversion import Storage
    from dsv4_convert.weights.converted import Weights
    from dsv4_convert.weights.difference import compare_checkpoints
    from dsv4_convert.weights.restore import restore_model

__all__ = [
    "Cache",
    "Config",
    "ConversionOptions",
    "FinishedSteps",
    "Golden",
    "Model",
    "ParityOptions",
    "RecordingOptions",
    "Storage",
    "Weights",
    "__version__",
    "compare_activations",
    "compare_checkpoints",
    "download",
    "generate",
    "hf_to_orbax",
    "inspect",
    "open_golden",
    "orbax_to_hf",
    "record_golden",
    "restore_model",
    "run_parity",
    "verify",
]

#: The module of each public name, and its name there if that differs.
_HOMES = {
    "Cache": ("dsv4_convert.model", "Cache"),
    "Config": ("dsv4_convert.spec.config", "Config"),
    "ConversionOptions": ("dsv4_convert.convert", "ConversionOptions"),
    "FinishedSteps": ("dsv4_convert.parity.finished", "FinishedSteps"),
    "Golden": ("dsv4_convert.golden.archive", "Golden"),
    "Model": ("dsv4_convert.model", "Model"),
    "ParityOptions": ("dsv4_convert.parity.run", "ParityOptions"),
    "RecordingOptions": ("dsv4_convert.golden.recorder", "RecordingOptions"),
    "Storage": ("dsv4_convert.spec.conversion", "Storage"),
    "Weights": ("dsv4_convert.weights.converted", "Weights"),
    "compare_activations": ("dsv4_convert.parity.activations", "compare_activations"),
    "compare_checkpoints": ("dsv4_convert.weights.difference", "compare_checkpoints"),
    "download": ("dsv4_convert.checkpoint.hub", "download"),
    "generate": ("dsv4_convert.serve.generate", "generate"),
    "hf_to_orbax": ("dsv4_convert.convert", "hf_to_orbax"),
    "inspect": ("dsv4_convert.inspection", "inspect"),
    "open_golden": ("dsv4_convert.golden.archive", "open_golden"),
    "orbax_to_hf": ("dsv4_convert.convert.to_hf", "orbax_to_hf"),
    "record_golden": ("dsv4_convert.golden.recorder", "record"),
    "restore_model": ("dsv4_convert.weights.restore", "restore_model"),
    "run_parity": ("dsv4_convert.parity.run", "run_parity"),
    "verify": ("dsv4_convert.convert.verification", "verify"),
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
