"""Ahead of time: the model compiled for TPU slices that are not there, and what it would take on them."""

from dsv4_convert.aot.render import render
from dsv4_convert.aot.report import Memory, Report
from dsv4_convert.aot.search import compile_model, smallest_slice
from dsv4_convert.aot.topology import Slice
from dsv4_convert.model.mesh import parse_mesh

__all__ = ["Memory", "Report", "Slice", "compile_model", "parse_mesh", "render", "smallest_slice"]
