"""All planted faults. Names are unique, because tests and the benchmark's table go by them."""

from __future__ import annotations

from .code import CODE
from .configs import CONFIGS
from .decoding import DECODING
from .fault import Fault
from .tables import TABLES
from .weights import WEIGHTS

CATALOGUE: dict[str, Fault] = {fault.name: fault for fault in (*WEIGHTS, *DECODING, *TABLES, *CONFIGS, *CODE)}
assert len(CATALOGUE) == len(WEIGHTS) + len(DECODING) + len(TABLES) + len(CONFIGS) + len(CODE)
