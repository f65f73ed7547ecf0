"""The gated ops' kernels for NVIDIA where each key channel has a decay of its own."""
