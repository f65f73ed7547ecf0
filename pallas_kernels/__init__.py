"""Kernels for accelerators; imports nothing of deltaformer_jax. nvidia/: Triton kernels, which no op uses yet."""
