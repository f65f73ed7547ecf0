"""DeltaFormer by an accelerator's kernels: a call of the op as their modules take it.

pallas_kernels/triton/delta/api.py and pallas_kernels/tpu/delta/api.py say what a module of kernels has.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import jax

from deltaformer_jax.ops.common.dispatch import KernelCall, Kernels, run_kernels
from deltaformer_jax.ops.common.similarity import NAMED, Own, Round
from deltaformer_jax.ops.deltaformer.chunked import Inputs, Plan


class _Arrays(NamedTuple):
    """`Inputs` without the arrays of similarities, which these kernels have not."""

    query: jax.Array | None
    write_query: jax.Array | None
    key: jax.Array
    value: jax.Array
    alpha: jax.Array | None
    beta: jax.Array | None
    segment_ids: jax.Array | None


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
    call = KernelCall(name, module, settings, _Arrays, "'parallel' or 'recurrent'")

    run = lambda inputs: run_kernels(call, _Arrays(*inputs[:7]))
    return Kernels(module.lacks(settings, inputs.key, inputs.value), run)
