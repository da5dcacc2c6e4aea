"""The interface of the code of each architecture, by its config."""

from __future__ import annotations

from collections.abc import Mapping

from dsv4_convert.golden.references.release.interface import Interface
from dsv4_convert.golden.references.release.v4 import V4Interface
from dsv4_convert.golden.references.release.v41 import V41Interface
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.v4.config import V4Config
from dsv4_convert.spec.v41.config import V41Config

INTERFACES: Mapping[type[Config], type[Interface]] = {V4Config: V4Interface, V41Config: V41Interface}
