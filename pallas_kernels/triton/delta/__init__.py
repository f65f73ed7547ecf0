"""DeltaFormer's kernels for NVIDIA."""
