"""NVIDIA kernels of the ops, in Triton; needs the packages `triton` and `jax-triton`.

The doors are delta/api.py and gated/api.py.
"""
