"""Where a model's parameters come from: a converted checkpoint or the published shards; and restoring the model."""
