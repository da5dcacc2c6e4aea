"""Whether this machine has what dsv4 needs, and what to do where it has not."""

from __future__ import annotations

from dsv4_convert.doctor.checks import examine
from dsv4_convert.doctor.finding import Diagnosis, Finding, State
from dsv4_convert.doctor.render import render

__all__ = ["Diagnosis", "Finding", "State", "examine", "render"]
