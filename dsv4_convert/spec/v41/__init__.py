"""The facts about DeepSeek-V4.1: architecture, names, taps."""
