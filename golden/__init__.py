"""Goldens: what a reference implementation computed, recorded tap by tap, to compare a converted model with.

:func:`golden.archive.open_golden` reads one and needs neither torch nor jax. :func:`golden.recorder.record` makes one
and needs the extra ``reference`` (torch and transformers).
"""
