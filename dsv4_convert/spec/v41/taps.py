"""The taps of DeepSeek-V4.1, one row each, in the order of execution (:mod:`dsv4_convert.spec.tap`)."""

from __future__ import annotations

from dsv4_convert.spec.tap import Tap

TAPS: tuple[Tap, ...] = ()

STATE: tuple[Tap, ...] = ()
