"""Kernels for accelerators; imports nothing of deltaformer_jax. triton/: for NVIDIA. tpu/: for TPUs. cudnn.py: cuDNN's
attention. What was run where: README.md."""
