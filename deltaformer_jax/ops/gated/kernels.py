"""The gated ops by an accelerator's kernels: a call as their modules take it.

pallas_kernels/triton/gated/api.py and pallas_kernels/tpu/gated/api.py say what a module of kernels has.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltaformer_jax.ops.common.dispatch import KernelCall, Kernels, run_kernels
from deltaformer_jax.ops.gated.chunked import Inputs, Plan


class _KernelInputs(NamedTuple):
    """As `Inputs`, padding zeroed in all of them: such a token decays by e^0, writes 0 at the key 0, reads with 0."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    beta: jax.Array | None
    log_decay: jax.Array | None
    state: jax.Array
    resets: jax.Array | None


def bind(plan: Plan, inputs: Inputs, name: str, module: ModuleType) -> Kernels:
    """`module`'s kernels for this call, as `gated_chunked(plan, inputs)`."""
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
        # They are 0 already; this keeps whatever comes back to them, NaN included, out of the gradients.
        return clean(out), final

    return Kernels(module.lacks(settings, inputs.key, inputs.value, inputs.log_decay), run)
