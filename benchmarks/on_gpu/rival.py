"""Calls of jax-linear-attention's kernels, if it is installed (`pip install jax-linear-attention`; for Hopper and one
version of JAX)."""

from __future__ import annotations

import importlib
import importlib.util

# Decay -> (module, function) of the delta rule.
KERNELS = {
    "head": ("jla.ops.mosaic_gpu.gated_delta_rule", "gated_delta_rule"),
    "channel": ("jla.ops.mosaic_gpu.kda", "kda"),
}


def lacks(shape) -> str | None:
    """Why there is no call, in a few words for a table, or None if there is one."""
    if not shape.delta or shape.decay not in KERNELS or shape.initial_state:
        return "no such op"
    return None if importlib.util.find_spec("jla") else "not installed"


def call(shape):
    """(arrays, segments) -> {"out": output, "state": final state}, as on_gpu/gated.py's call. Raises what the import of
    the package raises."""
    module, name = KERNELS[shape.decay]
    kernel = getattr(importlib.import_module(module), name)

    def run(arrays, segments):
        query, key, value, beta, gates = (arrays[x] for x in ("query", "key", "value", "beta", "log_decay"))
        out, state = kernel(query, key, value, gates, beta, output_final_state=True)
        return {"out": out, "state": state}

    return run
