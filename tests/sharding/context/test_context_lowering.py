"""The forms over a mesh axis lower for TPUs and NVIDIA GPUs, with the kernels inside where they call the ops."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from context_cases import AXIS, over

from deltaformer_jax import causal_attention, delta_attention
from deltaformer_jax.sharding.context.chain import delta_attention_pipeline
from deltaformer_jax.sharding.context.heads import over_heads
from deltaformer_jax.sharding.context.ring import causal_attention_ring
from deltaformer_jax.sharding.context.states import gated_delta_rule_states

DEVICES = 8


def spread(op):
    return lambda **arrays: over_heads(op, arrays, AXIS)


# Form for a device's part, kernels in its forward and backward pass at least.
FORMS = {
    "delta_over_heads": (spread(delta_attention), 2),
    "attention_over_heads": (spread(causal_attention), 2),
    "delta_rule_states": (lambda **arrays: gated_delta_rule_states(AXIS, **arrays)[0], 3),
    "delta_pipeline": (functools.partial(delta_attention_pipeline, AXIS), 0),
    "attention_ring": (functools.partial(causal_attention_ring, AXIS), 0),
}


def program(name):
    form, kernels = FORMS[name]
    x = lambda *size: jax.ShapeDtypeStruct((1, 1024, 8, *size), jnp.bfloat16)
    arrays = dict(query=x(128), key=x(128), value=x(128))
    if "attention" not in name:
        arrays["beta"] = x()
    ids = jax.ShapeDtypeStruct((1, 1024), jnp.int32)

    def loss(arrays, ids):
        return over(DEVICES, form, {**arrays, "segment_ids": ids}).astype(jnp.float32).sum()

    return jax.jit(jax.value_and_grad(loss)), (arrays, ids), kernels


@pytest.mark.parametrize("name", FORMS)
def test_for_tpus(name):
    function, arguments, kernels = program(name)
    text = jax.export.export(function, platforms=["tpu"])(*arguments).mlir_module()
    assert text.count("tpu_custom_call") >= kernels


@pytest.mark.parametrize("name", FORMS)
def test_for_gpus(name):
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        pytest.skip("JAX's CUDA plugin (extra `cuda`) is not installed")
    pytest.importorskip("jax_triton", reason="jax-triton is in the dependency group `kernels`, on Linux")
    function, arguments, kernels = program(name)
    lowered = function.trace(*arguments).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@triton_kernel_call") >= kernels
