"""Softmax attention by the vendors' kernels: a call of the op as pallas_kernels/cudnn.py and tpu/splash.py take it."""

from __future__ import annotations

from types import ModuleType

from deltaformer_jax.ops.common.dispatch import Kernels
from deltaformer_jax.ops.softmax.chunked import Inputs, Plan


def bind(plan: Plan, inputs: Inputs, name: str, module: ModuleType) -> Kernels:
    """`module`'s kernels for this call, as `attention_chunked(plan, inputs)`; JAX has their derivatives."""
    query, key, value, log_decay, sinks, _ = inputs

    def run(inputs):
        query, key, value, _, _, segment_ids = inputs
        return module.attend(query, key, value, segment_ids, scale=plan.scale, window=plan.window)

    return Kernels(module.lacks(query, key, value, log_decay, sinks), run)
