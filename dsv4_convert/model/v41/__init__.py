"""What DeepSeek-V4.1 computes differently from V4: a shared compressed past, engrams, and weights carried ahead."""
