"""Presenting a parity run: its outcome as data, in words, as tables, for CI, and as a page."""
