"""From a Hugging Face checkpoint to Orbax: plan, stream, commit."""

from __future__ import annotations

from dsv4_convert.convert.account import describe_rounding
from dsv4_convert.convert.estimate import Estimate, check_disk, estimate, worth_measuring
from dsv4_convert.convert.plan import MAX_MEMORY, Plan, plan
from dsv4_convert.convert.run import Advance, ConversionOptions, carry_out, hf_to_orbax
from dsv4_convert.spec.conversion import Layout, Storage

__all__ = [
    "MAX_MEMORY",
    "Advance",
    "ConversionOptions",
    "Estimate",
    "Layout",
    "Plan",
    "Storage",
    "carry_out",
    "check_disk",
    "describe_rounding",
    "estimate",
    "hf_to_orbax",
    "plan",
    "worth_measuring",
]
