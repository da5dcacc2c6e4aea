"""Somebody else's project: one layer of DeepSeek-V4 in plain jax.numpy, and its test against a golden of dsv4."""
