"""The facts about the models, as tables: architectures, names, taps, coverage, unsupported models, MaxText's names."""
