"""The parts of DeepSeek-V4.1 that differ from V4: a shared compressed past, engrams, and weights carried ahead."""
