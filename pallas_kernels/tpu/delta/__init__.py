"""DeltaFormer's kernels for TPUs."""
