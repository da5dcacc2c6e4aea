"""The facts about DeepSeek-V4: architecture, names, taps."""
