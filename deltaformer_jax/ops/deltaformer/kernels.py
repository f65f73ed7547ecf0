"""The accelerators' kernels behind delta_attention and delta_values: which there are, the call of one with its
backward, and who computes where nobody is named.

A package of kernels is a module with `Kappa`, `Settings`, `lacks`, `forward` and `backward`
(pallas_kernels/triton/delta/api.py says what they are). It is imported when a call may need it and not before: what it
is written in need not be installed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from deltaformer_jax.ops.common.hand_written import hand_written
from deltaformer_jax.ops.common.platforms import only_on, varies
from deltaformer_jax.ops.common.similarity import Round
from deltaformer_jax.ops.deltaformer.chunked import Plan, delta_chunked
from pallas_kernels.triton import packages as nvidia_packages


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The platform, the module, and what says which package is not installed (None: all are)."""

    platform: str
    module: str
    missing: Callable[[], str | None]


KERNELS = {
    "triton": Kernels("cuda", "pallas_kernels.triton.delta.api", nvidia_packages.missing),
    "pallas_tpu": Kernels("tpu", "pallas_kernels.tpu.delta.api", lambda: None),
}


@dataclasses.dataclass(frozen=True)
class _Call:
    """An implementation's name and its module's Settings."""

    name: str
    settings: Any

    @property
    def module(self):
        return importlib.import_module(KERNELS[self.name].module)


def _call_of(name: str, plan: Plan, key, value) -> tuple[_Call | None, str | None]:
    """The call of a kernel, and why it cannot be made: one of them is None."""
    reason = KERNELS[name].missing()
    if reason is not None:
        return None, reason
    module = importlib.import_module(KERNELS[name].module)

    def kappa(similarity, scale):
        decimals = {"decimals": similarity.decimals} if isinstance(similarity, Round) else {}
        return module.Kappa(type(similarity).__name__.lower(), scale, **decimals)

    # One pass writes and reads where the plan is tied.
    separate = plan.read_similarity is not None and not plan.tied
    read = kappa(plan.read_similarity, plan.read_scale) if separate else None
    settings = module.Settings(kappa(plan.write_similarity, plan.write_scale), read, plan.tied)
    reason = module.lacks(settings, key, value)
    return (_Call(name, settings), None) if reason is None else (None, reason)


def delta_by_kernel(name: str, plan: Plan, *arrays):
    """`delta_chunked` by the kernels of that name.

    Raises NotImplementedError: for a package that is missing or a call that they lack, at once; for another platform
    when the program is compiled for it.
    """
    call, reason = _call_of(name, plan, *arrays[2:4])
    if call is None:
        raise NotImplementedError(f"implementation={name!r}: {reason}; use None or 'chunked'")
    platform = KERNELS[name].platform
    message = f"implementation={name!r} runs on {platform} only: use None or 'chunked' to run on what there is"
    return only_on(platform, message, functools.partial(_delta, call), *arrays)


def fastest_delta(plan: Plan, *arrays):
    """`delta_chunked`, by the kernels of the platform that the program is compiled for where they can do the call."""
    if varies(*arrays):
        return delta_chunked(plan, *arrays)
    calls = {kernels.platform: _call_of(name, plan, *arrays[2:4])[0] for name, kernels in KERNELS.items()}
    bound = {platform: functools.partial(_delta, call) for platform, call in calls.items() if call is not None}
    chunked = functools.partial(delta_chunked, plan)
    return lax.platform_dependent(*arrays, default=chunked, **bound) if bound else chunked(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _delta(call, query, write_query, key, value, alpha, beta, segment_ids):
    return _forward(call, query, write_query, key, value, alpha, beta, segment_ids)[0]


def _forward(call, *arrays):
    *floats, segment_ids = arrays
    segment_ids = None if segment_ids is None else segment_ids.astype("int32")
    out, u, residuals = call.module.forward(call.settings, *floats, segment_ids)
    return (out, u), residuals


@hand_written(lambda call: call.name, "implementation='parallel' or 'recurrent'")
def _backward(call, residuals, cotangents):
    return (*call.module.backward(call.settings, residuals, *cotangents), None)


_delta.defvjp(_forward, _backward)
