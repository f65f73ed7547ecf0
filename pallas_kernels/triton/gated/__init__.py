"""The gated ops' kernels for NVIDIA."""
