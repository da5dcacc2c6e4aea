"""Where V4.1 rounds intermediate values as DeepSeek's inference code does, as far as it differs from V4.

* inputs of matrices that are stored in FP8 or FP4: FP8 in groups of 32 channels;
* keys: FP8 in groups of 32, the rotated channels too;
* compressed entries: FP4 in groups of 16 with scales in FP8 (e4m3);
* queries and keys of the indexer: FP4 in groups of 32, not rotated by a Hadamard matrix.

Source: published inference code of V4.1, ``kernel.py`` and ``model.py``.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float

from dsv4_convert.model.numerics import Numerics, fp4_rounded, fp4_rounded_by_fp8, fp8_rounded
from dsv4_convert.spec.config import Config

#: Channels that share a scale: of a key, of an entry, of a vector of the indexer.
_KEY, _ENTRY, _INDEX = 32, 16, 32


@dataclasses.dataclass(frozen=True)
class V41Numerics(Numerics):
    """Release numerics of V4.1."""

    input_group: ClassVar[int] = 32

    @classmethod
    def _unsuitable(cls, config: Config) -> list[str]:
        widths = {"head_dim": (config.head_dim, _KEY), "index_head_dim": (config.index_head_dim, _INDEX)}
        return [f"{name} {width}: a multiple of {group}" for name, (width, group) in widths.items() if width % group]

    def key(self, kv: Float[Array, "B X C"], rotated: int) -> Float[Array, "B X C"]:
        """Round a key to FP8, all of its channels."""
        return fp8_rounded(kv, _KEY) if self.release else kv

    def entry(self, entries: Float[Array, "B T C"], rotated: int) -> Float[Array, "B T C"]:
        """Round compressed entries to FP4."""
        return fp4_rounded_by_fp8(entries, _ENTRY) if self.release else entries

    def indexed(self, x: Float[Array, "... Ci"]) -> Float[Array, "... Ci"]:
        """Round a query or key of the indexer before it is scored."""
        return fp4_rounded(x, _INDEX) if self.release else x
