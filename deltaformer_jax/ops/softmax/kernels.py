"""Binds a call of softmax attention to kernels: pallas_kernels/triton/attention.py, and those of vendors in
pallas_kernels/cudnn.py and pallas_kernels/tpu/splash.py."""

from __future__ import annotations

from types import ModuleType

import jax

from deltaformer_jax.ops.common.dispatch import KernelCall, Kernels, run_kernels
from deltaformer_jax.ops.common.similarity import Softmax
from deltaformer_jax.ops.position_bias import PositionBias
from deltaformer_jax.ops.softmax.chunked import Inputs, Plan


def order(inputs: Inputs) -> tuple[str, ...]:
    """The kernels by preference. cuDNN's are faster, except with segment ids, for which they take a mask of T² entries
    per batch row."""
    return ("cudnn", "triton", "splash") if inputs.segment_ids is None else ("triton", "cudnn", "splash")


def bind(
    plan: Plan,
    lasting: jax.Array | None,
    bias: PositionBias | None,
    inputs: Inputs,
    name: str,
    module: ModuleType,
) -> Kernels:
    """`module`'s kernels for this call, in the place of `attention_chunked(plan, lasting, bias, inputs)`."""
    if bias is not None:
        return Kernels("its kernels support no position_bias")
    if lasting is not None:
        return Kernels("its kernels support neither keep nor initial")
    if plan.similarity != Softmax():
        return Kernels("its kernels support no other similarity than softmax")
    query, key, value, log_decay, sinks, _ = inputs
    if name == "triton":
        settings = module.settings_of(plan.scale)
        call = KernelCall(name, module, settings, Inputs, "'parallel' or 'recurrent'")
        lacks = module.lacks(settings, key, value, plan.window, log_decay, sinks)
        return Kernels(lacks, lambda inputs: run_kernels(call, inputs)[0])

    def run(inputs):  # the vendors' kernels bring their own derivatives
        query, key, value, _, _, segment_ids = inputs
        return module.attend(query, key, value, segment_ids, scale=plan.scale, window=plan.window)

    return Kernels(module.lacks(query, key, value, log_decay, sinks), run)
