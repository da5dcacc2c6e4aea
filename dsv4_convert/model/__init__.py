"""The model in Flax NNX. It knows nothing of files: parameters come from outside, by their paths."""

from dsv4_convert.model.block import Block
from dsv4_convert.model.cache import Cache
from dsv4_convert.model.model import Model
from dsv4_convert.model.numerics import PLAIN, Numerics
from dsv4_convert.model.recording import Taps

__all__ = ["PLAIN", "Block", "Cache", "Model", "Numerics", "Taps"]
