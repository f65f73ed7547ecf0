"""NVIDIA kernels of the ops, in Triton; needs the packages `triton` and `jax-triton`. delta.py is the door."""
