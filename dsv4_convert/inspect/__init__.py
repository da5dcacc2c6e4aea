"""What lies at a path: which kind of thing it is, the architecture in one picture, what it holds, and what is odd."""

from __future__ import annotations

from dsv4_convert.inspect.look import inspect
from dsv4_convert.inspect.parts import ModelPart, PartRow, Totals
from dsv4_convert.inspect.render import render
from dsv4_convert.inspect.report import Inspection, What

__all__ = ["Inspection", "ModelPart", "PartRow", "Totals", "What", "inspect", "render"]
