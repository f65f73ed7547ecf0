"""The gated ops' Triton kernels."""
