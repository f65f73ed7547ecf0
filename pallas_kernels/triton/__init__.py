"""The ops' kernels for NVIDIA GPUs, in Triton. They need the packages `triton` and `jax-triton`.

The entry points are delta/api.py and gated/api.py.
"""
