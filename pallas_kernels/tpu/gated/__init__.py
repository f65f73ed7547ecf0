"""The gated ops' kernels for TPUs."""
