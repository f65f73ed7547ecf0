"""The gated ops' TPU kernels."""
