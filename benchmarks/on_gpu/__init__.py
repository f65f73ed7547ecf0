"""The parts of benchmarks/gpu.py. Each says which cases it has, and has the function that a case's process calls."""

from on_gpu import delta, gated

# Each has Shape, draw, bound, inputs and call.
OPS = {"delta": delta, "gated": gated}
