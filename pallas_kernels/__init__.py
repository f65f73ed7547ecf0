"""Kernels for accelerators: triton/ and cudnn.py for NVIDIA GPUs, tpu/ for TPUs. This package does not import
deltaformer_jax. README.md says which kernels were interpreted, compiled and executed, and where."""
