"""Ahead of time: compiles the model for TPU slices without having one, and reports the resources it would need.

Slices are known without JAX, so that the shell can complete their names; what compiles is in
:mod:`dsv4_convert.aot.search`.
"""

from dsv4_convert.aot.topology import Slice

__all__ = ["Slice"]
