"""Inspection of a path: its kind, its architecture in one picture, its contents, and its oddities."""

from __future__ import annotations

from dsv4_convert.inspection.look import inspect
from dsv4_convert.inspection.parts import ModelPart, PartRow, Totals
from dsv4_convert.inspection.render import render
from dsv4_convert.inspection.report import Inspection, What

__all__ = ["Inspection", "ModelPart", "PartRow", "Totals", "What", "inspect", "render"]
