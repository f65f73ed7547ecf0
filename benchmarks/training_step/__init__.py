"""The training step of a config, counted or timed by part: what benchmarks/train.py calls."""
