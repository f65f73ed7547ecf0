"""The ops' kernels for TPUs, in Pallas (Mosaic)."""
