"""The model and the release numerics of each architecture, by its config."""

from __future__ import annotations

from dsv4_convert.model.model import Decoder, Model
from dsv4_convert.model.numerics import PLAIN, Numerics
from dsv4_convert.model.v41.model import V41Model
from dsv4_convert.model.v41.numerics import V41Numerics
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.v4.config import V4Config
from dsv4_convert.spec.v41.config import V41Config

_MODELS: dict[type[Config], type[Decoder]] = {V4Config: Model, V41Config: V41Model}
_NUMERICS: dict[type[Config], type[Numerics]] = {V4Config: Numerics, V41Config: V41Numerics}


def decoder_of(config: Config) -> type[Decoder]:
    """The class of the model of a config."""
    return _MODELS[type(config)]


def model_of(config: Config, numerics: Numerics = PLAIN, *, scanned: bool = False) -> Decoder:
    """The model of a config, its weights zero. ``scanned``: layers of one kind share a program."""
    return decoder_of(config)(config, numerics, scanned=scanned)


def release_numerics(config: Config) -> Numerics:
    """The numerics of DeepSeek's inference code for a model. Raises as :meth:`Numerics.of_release`."""
    return _NUMERICS[type(config)].of_release(config)
