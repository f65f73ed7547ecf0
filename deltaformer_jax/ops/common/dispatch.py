"""Chooses the implementation of an op's call: its portable form "chunked", or kernels for one platform.

BACKENDS lists the kernels of each op: their platform, how their module is loaded, and whether a package they need is
missing. A kernel module's `lacks` function says whether it supports a given call (its dtype, head dimension,
arguments). A kernel module is imported only when a call may need it, because the packages it uses are optional.

    implementation=None         the default choice: the kernels of the platform that the program is compiled for if they
                                support the call; else the form "chunked", which runs on every platform
    implementation="triton"     (or any other kernels' name) those kernels, or NotImplementedError. The error is raised
                                while tracing if a package is missing or the kernels do not support the call, and while
                                lowering if the program is compiled for another platform
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.host.spelling import did_you_mean
from deltaformer_jax.ops.common.hand_written import hand_written, made
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


def _triton_attention():
    from pallas_kernels.triton import attention

    return attention


def _cudnn():
    from pallas_kernels import cudnn

    return cudnn


def _splash():
    from pallas_kernels.tpu import splash

    return splash


@dataclasses.dataclass(frozen=True)
class Backend:
    """Kernels for one platform. `load` imports their module. `missing` says which package is not installed, or None."""

    platform: str
    load: Callable[[], ModuleType]
    missing: Callable[[], str | None] = lambda: None


# Op -> name of the implementation -> its kernels.
BACKENDS = {
    "delta": {
        "triton": Backend("cuda", _triton_delta, packages.missing),
        "pallas_tpu": Backend("tpu", _tpu_delta),
    },
    "gated": {
        "triton": Backend("cuda", _triton_gated, packages.missing),
        "pallas_tpu": Backend("tpu", _tpu_gated),
    },
    "generalized": {},
    "softmax": {
        "triton": Backend("cuda", _triton_attention, packages.missing),
        "cudnn": Backend("cuda", _cudnn),
        "splash": Backend("tpu", _splash),
    },
}

# The portable implementations: the definition token by token, T×T matrices, a scan over chunks.
FORMS = ("recurrent", "parallel", "chunked")

# The names that at least one op has.
IMPLEMENTATIONS = (*FORMS, *dict.fromkeys(name for backends in BACKENDS.values() for name in backends))


class Kernels(NamedTuple):
    """A backend's kernels bound to one call: why they do not support it (None if they do), and the function
    inputs -> outputs."""

    lacks: str | None
    function: Callable[[Any], Any] | None = None


def check_implementation(op: str, implementation: str | None, forms: tuple[str, ...] = FORMS) -> None:
    """Raise if `implementation` is not the name of an implementation of `op`.

    NotImplementedError: the name is that of kernels that only other ops have. ValueError: any other name.
    """
    available = (*forms, *BACKENDS[op])
    if implementation is None or implementation in available:
        return
    if implementation in IMPLEMENTATIONS and implementation not in FORMS:
        raise NotImplementedError(
            f"implementation={implementation!r}: this op has no kernels of that name; give one of {available} or None"
        )
    hint = did_you_mean(implementation, available)
    raise ValueError(f"implementation={implementation!r} is unknown: give one of {available} or None{hint}")


def dispatch(
    op: str,
    implementation: str | None,
    inputs: Any,
    *,
    chunked: Callable[[Any], Any],
    bind: Callable[[str, ModuleType], Kernels],
    order: tuple[str, ...] = (),
) -> Any:
    """The outputs of `op` for `inputs`, a pytree of arrays, by the named implementation or the default choice (None).

    `chunked(inputs)` is the portable form. `bind(name, module)` binds a kernel module to this call. `order`: of several
    kernels for one platform, the default choice is the first here that supports the call.
    """
    if implementation == "chunked" or (implementation is None and varies(inputs)):
        return chunked(inputs)
    if implementation is None:
        able = {}
        for name in order or BACKENDS[op]:
            backend = BACKENDS[op][name]
            if backend.platform not in able and (kernels := _bound(name, backend, bind)).lacks is None:
                able[backend.platform] = kernels.function
        return lax.platform_dependent(inputs, default=chunked, **able) if able else chunked(inputs)
    backend = BACKENDS[op][implementation]
    kernels = _bound(implementation, backend, bind)
    if kernels.lacks is not None:
        raise NotImplementedError(f"implementation={implementation!r}: {kernels.lacks}; use None or 'chunked'")
    message = f"implementation={implementation!r} runs on {backend.platform} only: use None or 'chunked'"
    return only_on(backend.platform, f"{message} to run on another platform", kernels.function, inputs)


def _bound(name: str, backend: Backend, bind: Callable[[str, ModuleType], Kernels]) -> Kernels:
    missing = backend.missing()
    if missing:
        return Kernels(missing)
    lacks, function = bind(name, backend.load())
    return Kernels(lacks, lambda inputs: function(jax.tree.map(_narrow, inputs)))


def _narrow(x):
    """A float64 array as float32. The kernels keep gates and states in float32, and a caller may give them in float64
    beside narrower values."""
    return x.astype(jnp.float32) if x.dtype == jnp.float64 else x


class KernelCall(NamedTuple):
    """The static part of a call of kernels that have a hand-written backward pass.

    name: the implementation's name. module: the kernel module. settings: its `Settings`. inputs: the NamedTuple type of
    the inputs. differentiable: the implementations that have the derivatives which these kernels lack, for an error.
    """

    name: str
    module: ModuleType
    settings: Any
    inputs: type
    differentiable: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_kernels(call: KernelCall, inputs):
    """The outputs of `call.module.forward(settings, *inputs)`, differentiated by `call.module.backward`.

    `inputs` is a NamedTuple in the order of forward's arguments. Its last array holds integers or booleans and has no
    gradient.
    """
    return _forward(call, inputs)[0]


def _forward(call, inputs):
    *outputs, (inputs, by_kernels) = call.module.forward(call.settings, *inputs)
    outputs, by_kernels = made((tuple(outputs), by_kernels))
    return outputs, (inputs, by_kernels)


@hand_written(lambda call: call.name, lambda call: f"implementation={call.differentiable}")
def _backward(call, residuals, cotangents):
    return (call.inputs(*call.module.backward(call.settings, residuals, *cotangents), None),)


run_kernels.defvjp(_forward, _backward)
