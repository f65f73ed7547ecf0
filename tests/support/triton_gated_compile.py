"""Descriptions of the gated ops' Triton launches at training shapes, to be compiled without a GPU."""

from __future__ import annotations

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp

from pallas_kernels.triton.delta.table import SHARED_MEMORY, WIDTHS
from pallas_kernels.triton.gated import api as gated
from pallas_kernels.triton.gated.table import CHANNEL_KERNELS, CHUNKS, KERNELS
from support.triton_compile import compiled

# (kernel, decay) of all kernels. Every launch uses all options of its kernel.
ALL_KERNELS = [(kernel, "head") for kernel in KERNELS] + [(kernel, "channel") for kernel in CHANNEL_KERNELS]
CONFIGURATIONS = [(*kernel, narrow, width) for kernel in ALL_KERNELS for narrow in (True, False) for width in WIDTHS]


@functools.cache
def launches(capability, width, narrow, delta=True, decay="head", segments=True, plan="stages"):
    """{kernel's name: Launch} of a forward and a backward pass at batch 4, 8192 tokens, 16 heads, 32 value heads.

    decay: "none", "head" (one per head) or "channel" (one per channel). plan: one of table.PLANS.
    """
    dtype = jnp.bfloat16 if narrow else jnp.float32
    array = lambda heads, *more: jax.ShapeDtypeStruct((4, 8192, heads, *more), dtype)
    x, v, beta = array(16, width), array(32, width), array(32)
    log_decay = array(32, width) if decay == "channel" else array(32)
    state = jax.ShapeDtypeStruct((4, 32, width, width), jnp.float32)
    resets = jax.ShapeDtypeStruct((4, 8192), jnp.bool_)
    settings = gated.Settings(0.1, delta, capability, plan=plan)
    found = {}

    def note(launch):
        shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in launch.arrays)
        found[launch.kernel.__name__] = dataclasses.replace(launch, arrays=shapes)
        return [jnp.zeros(x.shape, x.dtype) for x in launch.outputs]

    def both(query, key, value, beta, log_decay, state, resets, dout):
        gates = (beta if delta else None, None if decay == "none" else log_decay)
        arrays = (query, key, value, *gates, state, resets if segments else None)
        _, final, residuals = gated.forward(settings, *arrays, run=note)
        return gated.backward(settings, residuals, dout, final, run=note)

    jax.eval_shape(both, x, x, v, beta, log_decay, state, resets, v)
    return found


def launch_of(kernel, decay, capability, width, narrow):
    """The launch of a kernel with all its options."""
    return launches(capability, width, narrow, decay=decay)[kernel]


if __name__ == "__main__":
    for capability in [int(x) for x in sys.argv[1:]] or sorted({x for x, _ in CHUNKS}):
        for width in WIDTHS:
            for narrow in (True, False):
                for kernel, decay in ALL_KERNELS:
                    ptx, shared, spilled = compiled(launch_of(kernel, decay, capability, width, narrow), capability)
                    print(
                        capability,
                        width,
                        "two-byte" if narrow else "float32",
                        kernel,
                        decay,
                        f"{shared} bytes shared of {SHARED_MEMORY[capability]}, {spilled} spilled,",
                        "wgmma" if "wgmma" in ptx else "",
                        flush=True,
                    )
