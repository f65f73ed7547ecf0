"""The accelerators' kernels behind gated_delta_rule and gated_linear_attention: which there are, the call of one with
its backward, and who computes where nobody is named. As delta_kernels.py; here a package of kernels is a module with
`Settings`, `lacks`, `forward` and `backward` (pallas_kernels/triton/gated/api.py says what they are).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common.hand_written import hand_written
from deltaformer_jax.ops.common.platforms import only_on, varies
from deltaformer_jax.ops.deltaformer.kernels import Kernels
from deltaformer_jax.ops.gated.chunked import Plan, gated_chunked
from pallas_kernels.triton import packages as nvidia_packages

KERNELS = {
    "triton": Kernels("cuda", "pallas_kernels.triton.gated.api", nvidia_packages.missing),
    "pallas_tpu": Kernels("tpu", "pallas_kernels.tpu.gated.api", lambda: None),
}


@dataclasses.dataclass(frozen=True)
class _Call:
    """An implementation's name and its module's Settings."""

    name: str
    settings: Any

    @property
    def module(self):
        return importlib.import_module(KERNELS[self.name].module)


def _call_of(name: str, plan: Plan, key, value, log_decay) -> tuple[_Call | None, str | None]:
    """The call of a kernel, and why it cannot be made: one of them is None."""
    reason = KERNELS[name].missing()
    if reason is not None:
        return None, reason
    module = importlib.import_module(KERNELS[name].module)
    settings = module.Settings(plan.scale, plan.delta)
    reason = module.lacks(settings, key, value, log_decay)
    return (_Call(name, settings), None) if reason is None else (None, reason)


def gated_by_kernel(name: str, plan: Plan, *arrays):
    """`gated_chunked` by the kernels of that name.

    Raises NotImplementedError: for a package that is missing or a call that they lack, at once; for another platform
    when the program is compiled for it.
    """
    _, key, value, _, log_decay, *_ = arrays
    call, reason = _call_of(name, plan, key, value, log_decay)
    if call is None:
        raise NotImplementedError(f"implementation={name!r}: {reason}; use None or 'chunked'")
    platform = KERNELS[name].platform
    message = f"implementation={name!r} runs on {platform} only: use None or 'chunked' to run on what there is"
    return only_on(platform, message, functools.partial(_without_padding, call), *arrays)


def fastest_gated(plan: Plan, *arrays):
    """`gated_chunked`, by the kernels of the platform that the program is compiled for where they can do the call."""
    _, key, value, _, log_decay, *_ = arrays
    if varies(*arrays):
        return gated_chunked(plan, *arrays)
    calls = {kernels.platform: _call_of(name, plan, key, value, log_decay)[0] for name, kernels in KERNELS.items()}
    bound = {platform: functools.partial(_without_padding, call) for platform, call in calls.items() if call}
    chunked = functools.partial(gated_chunked, plan)
    return lax.platform_dependent(*arrays, default=chunked, **bound) if bound else chunked(*arrays)


def _without_padding(call, query, key, value, beta, log_decay, state, real, resets):
    """Padding zeroed: such a token decays by e^0, writes 0 at the key 0 and reads with the query 0."""

    def clean(x):
        if x is None or real is None:
            return x
        return jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, jnp.zeros((), x.dtype))

    out, final = _gated(call, *map(clean, (query, key, value, beta, log_decay)), state, resets)
    # They are 0 already; this keeps whatever comes back to them, NaN included, out of the gradients.
    return clean(out), final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(call, *arrays):
    return _forward(call, *arrays)[0]


def _forward(call, *arrays):
    out, final, residuals = call.module.forward(call.settings, *arrays)
    return (out, final), residuals


@hand_written(lambda call: call.name, "implementation='recurrent'")
def _backward(call, residuals, cotangents):
    return (*call.module.backward(call.settings, residuals, *cotangents), None)


_gated.defvjp(_forward, _backward)
