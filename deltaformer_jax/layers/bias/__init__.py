"""Biases of attention scores with trained numbers."""
