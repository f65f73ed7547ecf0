"""The gated ops' kernels with a decay per key channel."""
