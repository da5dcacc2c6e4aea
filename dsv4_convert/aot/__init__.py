"""Ahead of time: the model compiled for TPU slices that are not there, and what it would take on them.

Slices are known without JAX, so that the shell can complete their names; what compiles is in
:mod:`dsv4_convert.aot.search`.
"""

from dsv4_convert.aot.topology import Slice

__all__ = ["Slice"]
