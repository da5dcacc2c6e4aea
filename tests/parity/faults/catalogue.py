"""All planted faults. Names are unique, because tests and the benchmark's table go by them."""

from __future__ import annotations

from .code import CODE
from .configs import CONFIGS
from .decoding import DECODING
from .drafts import DRAFT_FAULTS
from .drafts_v41 import DRAFT_FAULTS_V41
from .fault import Fault
from .stages import STAGES
from .tables import TABLES
from .v41 import V41
from .weights import WEIGHTS

_ALL = (*WEIGHTS, *DECODING, *TABLES, *CONFIGS, *CODE, *STAGES, *DRAFT_FAULTS)
CATALOGUE: dict[str, Fault] = {fault.name: fault for fault in _ALL}
assert len(CATALOGUE) == len(_ALL)
_ALL_V41 = (*V41, *DRAFT_FAULTS_V41)
CATALOGUE_V41: dict[str, Fault] = {fault.name: fault for fault in _ALL_V41}
assert len(CATALOGUE_V41) == len(_ALL_V41)
