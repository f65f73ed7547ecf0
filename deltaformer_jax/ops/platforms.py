"""A function that exists on one platform only: what a named implementation runs, or the error it is refused with.

The platform is the one the program is compiled for, which while tracing nobody knows: a TPU's program may be compiled
on a CPU. So the refusal waits in the program as a primitive that cannot be lowered.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.extend import core
from jax.interpreters import batching, mlir

_refusal = core.Primitive("refusal")
_refusal.multiple_results = True


@_refusal.def_abstract_eval
def _refusal_shapes(*, message, shapes):
    del message
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in shapes]


def _refuse(context, *, message, shapes):
    raise NotImplementedError(message)


def _refuse_now(*, message, shapes):
    raise NotImplementedError(message)


mlir.register_lowering(_refusal, _refuse)
_refusal.def_impl(_refuse_now)
batching.primitive_batchers[_refusal] = lambda arguments, dims, **settings: (_refusal.bind(**settings), ())


def only_on(platform: str, message: str, function: Callable, *arguments):
    """function(*arguments) where the program is compiled for `platform` ("tpu", "cuda", "cpu").

    Lowering for another raises NotImplementedError(message).
    """
    shapes, structure = jax.tree.flatten(jax.eval_shape(function, *arguments))

    def refuse(*_):
        out = _refusal.bind(message=message, shapes=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes))
        return jax.tree.unflatten(structure, out)

    return jax.lax.platform_dependent(*arguments, default=refuse, **{platform: function})
