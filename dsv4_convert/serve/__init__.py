"""Generating tokens with a restored model: step by step, or with speculative decoding."""
