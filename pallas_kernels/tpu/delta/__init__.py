"""DeltaFormer's TPU kernels."""
