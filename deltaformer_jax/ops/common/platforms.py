"""A function that exists on one platform only: what a named implementation runs, or the error it is refused with.

The platform is the one the program is compiled for, which while tracing nobody knows: a TPU's program may be compiled
on a CPU. So the refusal waits in the program as a primitive that cannot be lowered.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
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


def varies(*arrays) -> bool:
    """Whether JAX keeps account of mesh axes that any of the arrays varies over, as inside shard_map by default.

    A kernel says nothing of its outputs' axes: there it needs check_vma=False, under which nothing is accounted for.
    """
    kinds = [jax.typeof(x).manual_axis_type for x in jax.tree.leaves(arrays)]
    return any(kind.varying for kind in kinds)


def only_on(platform: str, message: str, function: Callable, *arguments):
    """function(*arguments) where the program is compiled for `platform` ("tpu", "cuda", "cpu").

    Lowering for another raises NotImplementedError(message).
    """
    outputs, inputs = jax.eval_shape(function, *arguments), jax.eval_shape(lambda *x: x, *arguments)

    # The gradients are a refusal too: zeros would do for a value nobody uses, and the program would be compiled.
    @jax.custom_vjp
    def refuse(*_):
        return _refused(message, outputs)

    def gradients(*_):
        return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, _refused(message, inputs))

    refuse.defvjp(lambda *_: (_refused(message, outputs), None), gradients)
    return jax.lax.platform_dependent(*arguments, default=refuse, **{platform: function})


def _refused(message, like):
    """Arrays as `like`'s that make the program one that cannot be lowered."""
    shapes, structure = jax.tree.flatten(like)
    out = _refusal.bind(message=message, shapes=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes))
    return jax.tree.unflatten(structure, out)
