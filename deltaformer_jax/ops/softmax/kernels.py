"""Binds a call of softmax attention to a vendor's kernels: pallas_kernels/cudnn.py, pallas_kernels/tpu/splash.py."""

from __future__ import annotations

from types import ModuleType

from deltaformer_jax.ops.common.dispatch import Kernels
from deltaformer_jax.ops.softmax.chunked import Inputs, Plan


def bind(plan: Plan, inputs: Inputs, name: str, module: ModuleType) -> Kernels:
    """`module`'s kernels for this call, in the place of `attention_chunked(plan, inputs)`. The kernels bring their own
    derivatives."""
    query, key, value, log_decay, sinks, _ = inputs

    def run(inputs):
        query, key, value, _, _, segment_ids = inputs
        return module.attend(query, key, value, segment_ids, scale=plan.scale, window=plan.window)

    return Kernels(module.lacks(query, key, value, log_decay, sinks), run)
