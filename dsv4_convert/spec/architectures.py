"""The architectures that dsv4 knows: their configs, which name everything else."""

from __future__ import annotations

from collections.abc import Mapping

from dsv4_convert.spec.config import Config
from dsv4_convert.spec.v4.config import V4Config
from dsv4_convert.spec.v41.config import V41Config

#: Every architecture, in the order of their release.
ARCHITECTURES: tuple[type[Config], ...] = (V4Config, V41Config)

BY_MODEL_TYPE: Mapping[str, type[Config]] = {known.model_type: known for known in ARCHITECTURES}
