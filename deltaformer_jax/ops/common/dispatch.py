"""Who computes a call of an op: its portable form, or kernels that are made for one platform.

BACKENDS says what kernels each op has, for which platform, how they are loaded and which package they miss. What they
lack for one call (a dtype, a width, an argument) their own module says, in its `lacks`. A module of kernels is imported
when a call may need it and not before: what it is written in need not be installed.

    implementation=None         the kernels of the platform that the program is compiled for, where there are some that
                                can do the call; else the form "chunked", which runs everywhere
    implementation="triton"     those kernels or NotImplementedError: at once for a package that is missing or a call
                                that they lack, and when the program is compiled for another platform
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common.hand_written import hand_written
from deltaformer_jax.ops.common.platforms import only_on, varies
from pallas_kernels.triton import packages


def _triton_delta():
    from pallas_kernels.triton.delta import api

    return api


def _tpu_delta():
    from pallas_kernels.tpu.delta import api

    return api


def _triton_gated():
    from pallas_kernels.triton.gated import api

    return api


def _tpu_gated():
    from pallas_kernels.tpu.gated import api

    return api


def _cudnn():
    from pallas_kernels import cudnn

    return cudnn


def _splash():
    from pallas_kernels.tpu import splash

    return splash


@dataclasses.dataclass(frozen=True)
class Backend:
    """Kernels for one platform: how their module is loaded, and which package is not installed (None: all are)."""

    platform: str
    load: Callable[[], ModuleType]
    missing: Callable[[], str | None] = lambda: None


# Op -> the implementation's name -> its kernels.
BACKENDS = {
    "delta": {
        "triton": Backend("cuda", _triton_delta, packages.missing),
        "pallas_tpu": Backend("tpu", _tpu_delta),
    },
    "gated": {
        "triton": Backend("cuda", _triton_gated, packages.missing),
        "pallas_tpu": Backend("tpu", _tpu_gated),
    },
    "softmax": {
        "cudnn": Backend("cuda", _cudnn),
        "splash": Backend("tpu", _splash),
    },
}

# The portable forms: the definition token by token, T×T matrices, a scan over chunks.
FORMS = ("recurrent", "parallel", "chunked")

# All that some op has.
IMPLEMENTATIONS = (*FORMS, *dict.fromkeys(name for backends in BACKENDS.values() for name in backends))


class Kernels(NamedTuple):
    """A backend's kernels bound to one call: why they cannot do it (None: they can), and inputs -> outputs."""

    lacks: str | None
    function: Callable[[Any], Any] | None = None


def check_implementation(op: str, implementation: str | None, forms: tuple[str, ...] = FORMS) -> None:
    """Raise for a name that is no implementation of `op`: NotImplementedError if another op has it, else ValueError."""
    available = (*forms, *BACKENDS[op])
    if implementation is None or implementation in available:
        return
    if implementation in IMPLEMENTATIONS and implementation not in FORMS:
        raise NotImplementedError(
            f"implementation={implementation!r}: this op has no such kernels; give one of {available} or None"
        )
    near = difflib.get_close_matches(str(implementation), available, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"implementation={implementation!r} is unknown: give one of {available} or None.{hint}")


def dispatch(
    op: str,
    implementation: str | None,
    inputs: Any,
    *,
    chunked: Callable[[Any], Any],
    bind: Callable[[str, ModuleType], Kernels],
) -> Any:
    """The outputs of `op` for `inputs`, a pytree of arrays, by the implementation that the caller names or None.

    `chunked(inputs)` is the portable form; `bind(name, module)` binds a backend's module to this call.
    """
    if implementation == "chunked" or (implementation is None and varies(inputs)):
        return chunked(inputs)
    if implementation is None:
        bound = {backend.platform: _bound(name, backend, bind) for name, backend in BACKENDS[op].items()}
        able = {platform: kernels.function for platform, kernels in bound.items() if kernels.lacks is None}
        return lax.platform_dependent(inputs, default=chunked, **able) if able else chunked(inputs)
    backend = BACKENDS[op][implementation]
    kernels = _bound(implementation, backend, bind)
    if kernels.lacks is not None:
        raise NotImplementedError(f"implementation={implementation!r}: {kernels.lacks}; use None or 'chunked'")
    message = f"implementation={implementation!r} runs on {backend.platform} only: use None or 'chunked'"
    return only_on(backend.platform, f"{message} to run on what there is", kernels.function, inputs)


def _bound(name: str, backend: Backend, bind: Callable[[str, ModuleType], Kernels]) -> Kernels:
    missing = backend.missing()
    if missing:
        return Kernels(missing)
    lacks, function = bind(name, backend.load())
    return Kernels(lacks, lambda inputs: function(jax.tree.map(_narrow, inputs)))


def _narrow(x):
    """Float64 gates and states beside narrower values as float32, which kernels keep them in."""
    return x.astype(jnp.float32) if x.dtype == jnp.float64 else x


class KernelCall(NamedTuple):
    """What is known while tracing a call of kernels with a backward of their own.

    The implementation's name, the module and its Settings; the type of the inputs; and which implementations of the op
    have the derivatives that these kernels lack.
    """

    name: str
    module: ModuleType
    settings: Any
    inputs: type
    differentiable: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_kernels(call: KernelCall, inputs):
    """The pair of outputs of `call.module.forward(settings, *inputs)`, with `call.module.backward` for its gradient.

    `inputs` is a NamedTuple in the order of forward's arguments, of which the last holds integers and has no gradient.
    """
    return _forward(call, inputs)[0]


def _forward(call, inputs):
    *outputs, residuals = call.module.forward(call.settings, *inputs)
    return tuple(outputs), residuals


@hand_written(lambda call: call.name, lambda call: f"implementation={call.differentiable}")
def _backward(call, residuals, cotangents):
    return (call.inputs(*call.module.backward(call.settings, residuals, *cotangents), None),)


run_kernels.defvjp(_forward, _backward)
