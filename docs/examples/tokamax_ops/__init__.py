"""tokamax's DeepSeek-V4 ops against a golden of dsv4, one op at a time."""
