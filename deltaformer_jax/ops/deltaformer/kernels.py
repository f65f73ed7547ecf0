"""DeltaFormer by an accelerator's kernels: a call of the op as their modules take it.

pallas_kernels/triton/delta/api.py and pallas_kernels/tpu/delta/api.py say what a module of kernels has.
"""

from __future__ import annotations

import functools
from types import ModuleType

from deltaformer_jax.ops.common.dispatch import KernelCall, Kernels, run_kernels
from deltaformer_jax.ops.common.similarity import NAMED, Own, Round
from deltaformer_jax.ops.deltaformer.chunked import Inputs, Plan


def bind(plan: Plan, inputs: Inputs, name: str, module: ModuleType) -> Kernels:
    """`module`'s kernels for this call, as `delta_chunked(plan, inputs)`."""

    if any(isinstance(similarity, Own) for similarity in (plan.write_similarity, plan.read_similarity)):
        return Kernels(f"its kernels have the similarities {', '.join(NAMED)} and none of yours")

    def kappa(similarity, scale):
        decimals = {"decimals": similarity.decimals} if isinstance(similarity, Round) else {}
        return module.Kappa(type(similarity).__name__.lower(), scale, **decimals)

    # One pass writes and reads where the plan is tied.
    separate = plan.read_similarity is not None and not plan.tied
    read = kappa(plan.read_similarity, plan.read_scale) if separate else None
    settings = module.Settings(kappa(plan.write_similarity, plan.write_scale), read, plan.tied)
    call = KernelCall(name, module, settings, Inputs, "'parallel' or 'recurrent'")

    return Kernels(module.lacks(settings, inputs.key, inputs.value), functools.partial(run_kernels, call))
