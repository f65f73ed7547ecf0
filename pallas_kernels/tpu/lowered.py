"""Traces a kernel's call only if the program is lowered: a program that has the call beside those of other platforms,
and is compiled for one of them, does not pay for it. Tracing the body of a Pallas kernel takes longer than all else in
a call of an op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from jax.extend import core
from jax.interpreters import mlir

from pallas_kernels.transform import usual_arithmetic

_lowered = core.Primitive("traced_when_lowered")
_lowered.multiple_results = True


def traced_when_lowered(
    function: Callable, outputs: Sequence[jax.ShapeDtypeStruct], *arrays: jax.Array
) -> list[jax.Array]:
    """function(*arrays), a list of arrays of the shapes and dtypes `outputs`.

    It has no derivative and no rule for vmap, which its callers give (transform.py). Raises ValueError inside a
    `jax.shard_map` that tracks mesh axes: it needs check_vma=False, as `pallas_call` does.
    """
    return _lowered.bind(*arrays, function=function, outputs=tuple(outputs))


@_lowered.def_abstract_eval
def _shapes(*arrays, function, outputs):
    del function
    if any(x.manual_axis_type.varying for x in arrays):
        raise ValueError("a Pallas kernel inside jax.shard_map needs check_vma=False")
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in outputs]


def _run(*arrays, function, outputs):
    del outputs
    with usual_arithmetic():
        return function(*arrays)


_lowered.def_impl(jax.jit(_run, static_argnames=("function", "outputs")))
mlir.register_lowering(_lowered, mlir.lower_fun(_run, multiple_results=True))
