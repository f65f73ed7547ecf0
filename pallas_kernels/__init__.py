"""Kernels for accelerators: Pallas for TPU, jax-triton for NVIDIA. None yet; imports nothing of deltaformer_jax."""
