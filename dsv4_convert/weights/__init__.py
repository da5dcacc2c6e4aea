"""Sources of a model's parameters (a converted checkpoint or the published shards), and restoring the model."""
