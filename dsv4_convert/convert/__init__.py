"""From a Hugging Face checkpoint to Orbax: plan, stream, commit."""

from __future__ import annotations

from dsv4_convert.convert.plan import Plan, plan
from dsv4_convert.convert.run import dry_run, hf_to_orbax
from dsv4_convert.convert.storage import Storage

__all__ = ["Plan", "Storage", "dry_run", "hf_to_orbax", "plan"]
