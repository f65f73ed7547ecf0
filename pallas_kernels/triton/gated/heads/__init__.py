"""The gated ops' kernels without decay, or with one decay per head."""
