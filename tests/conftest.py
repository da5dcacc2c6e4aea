"""Settings of every test."""

from __future__ import annotations

import os

from hypothesis import settings

# No deadline: the first example of a test may compile a program. Derandomised, so that CI says the same every time.
settings.register_profile("dsv4", deadline=None, derandomize=True)
settings.load_profile("dsv4")

# transformers must neither look for a hub nor draw progress bars into the test output.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
