"""Binds a call of a gated op to a module of kernels.

The modules are pallas_kernels/triton/gated/api.py and pallas_kernels/tpu/gated/api.py. They document the functions that
a kernel module has.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltaformer_jax.ops.common.dispatch import KernelCall, Kernels, run_kernels
from deltaformer_jax.ops.gated.chunked import Inputs, Plan


class _KernelInputs(NamedTuple):
    """The arrays of `Inputs` set to 0 at padding, without `real`. A padding token then decays by e^0 = 1, writes 0 and
    reads 0."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    beta: jax.Array | None
    log_decay: jax.Array | None
    state: jax.Array
    resets: jax.Array | None


def bind(plan: Plan, inputs: Inputs, name: str, module: ModuleType) -> Kernels:
    """`module`'s kernels for this call, in the place of `gated_chunked(plan, inputs)`."""
    settings = module.Settings(plan.scale, plan.delta)
    call = KernelCall(name, module, settings, _KernelInputs, "'recurrent'")

    def run(inputs):
        def clean(x):
            if x is None or inputs.real is None:
                return x
            real = inputs.real.reshape(*inputs.real.shape, *[1] * (x.ndim - 2))
            return jnp.where(real, x, jnp.zeros((), x.dtype))

        query, key, value, beta, log_decay, state, _, resets = inputs
        cleaned = map(clean, (query, key, value, beta, log_decay))
        out, final = run_kernels(call, _KernelInputs(*cleaned, state, resets))
        # The outputs at padding are 0 already. The mask is for the gradients: a cotangent at padding, even NaN, stops
        # here.
        return clean(out), final

    return Kernels(module.lacks(settings, inputs.key, inputs.value, inputs.log_decay), run)
