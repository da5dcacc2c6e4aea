"""DeepSeek's own inference code as a reference: the user's copy of it, with kernels that run on a CPU."""
