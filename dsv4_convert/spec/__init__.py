"""The facts about DeepSeek-V4, as tables: architecture, names, taps, coverage, unsupported models, MaxText's names."""
