"""Goldens: what a reference implementation computed, recorded tap by tap, to compare a converted model with.

:func:`dsv4_convert.golden.archive.open_golden` reads one and needs neither torch nor jax.
:func:`dsv4_convert.golden.recorder.record` makes one and needs the extra ``reference`` (torch and transformers).
"""
