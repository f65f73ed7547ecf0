"""Binds a call of DeltaFormer to a module of kernels.

The modules are pallas_kernels/triton/delta/api.py and pallas_kernels/tpu/delta/api.py. They document the functions that
a kernel module has.
"""

from __future__ import annotations

import functools
from types import ModuleType

from deltaformer_jax.ops.common.dispatch import KernelCall, Kernels, run_kernels
from deltaformer_jax.ops.common.similarity import WRITES, Own, Round, SelfAdjust
from deltaformer_jax.ops.deltaformer.chunked import Inputs, Plan
from deltaformer_jax.ops.position_bias import Biases


def bind(plan: Plan, biases: Biases, inputs: Inputs, name: str, module: ModuleType) -> Kernels:
    """`module`'s kernels for this call, in the place of `delta_chunked`."""
    for name, bias in biases._asdict().items():
        if bias is not None:
            return Kernels(f"its kernels support no {name}_bias")
    if plan.window is not None:
        return Kernels("its kernels support neither window, keep nor initial")
    if any(isinstance(similarity, Own | SelfAdjust) for similarity in (plan.write_similarity, plan.read_similarity)):
        return Kernels(f"its kernels support only the similarities {', '.join(WRITES)}")

    def kappa(similarity, scale):
        decimals = {"decimals": similarity.decimals} if isinstance(similarity, Round) else {}
        return module.Kappa(type(similarity).__name__.lower(), scale, **decimals)

    # If the plan is tied, one pass writes and reads, and there is no separate read.
    separate = plan.read_similarity is not None and not plan.tied
    read = kappa(plan.read_similarity, plan.read_scale) if separate else None
    settings = module.Settings(kappa(plan.write_similarity, plan.write_scale), read, plan.tied)
    call = KernelCall(name, module, settings, Inputs, "'parallel' or 'recurrent'")

    return Kernels(module.lacks(settings, inputs.key, inputs.value), functools.partial(run_kernels, call))
