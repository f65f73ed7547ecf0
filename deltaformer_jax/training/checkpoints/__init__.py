"""Checkpoints: written and checked, restored, gone back to."""
