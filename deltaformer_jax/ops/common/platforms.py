"""Functions that exist on one platform only: `only_on` runs one there and raises NotImplementedError elsewhere.

The platform is the one that the program is compiled for. It is not known while tracing: a TPU program may be compiled
on a CPU machine. `only_on` therefore puts a primitive into the program that cannot be lowered. Lowering raises the
error if the program is compiled for another platform.
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
    """Whether JAX tracks mesh axes that any of the arrays varies over. It does so by default inside shard_map.

    The kernels do not declare the mesh axes that their outputs vary over. Inside shard_map they need check_vma=False,
    with which JAX tracks no axes.
    """
    kinds = [jax.typeof(x).manual_axis_type for x in jax.tree.leaves(arrays)]
    return any(kind.varying for kind in kinds)


def only_on(platform: str, message: str, function: Callable, *arguments):
    """function(*arguments) if the program is compiled for `platform` ("tpu", "cuda", "cpu").

    Lowering for another platform raises NotImplementedError(message).
    """
    outputs, inputs = jax.eval_shape(function, *arguments), jax.eval_shape(lambda *x: x, *arguments)

    # The gradients must not be zeros: a program that uses the gradients only would then compile, and return zeros.
    @jax.custom_vjp
    def refuse(*_):
        return _refused(message, outputs)

    def gradients(*_):
        return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, _refused(message, inputs))

    refuse.defvjp(lambda *_: (_refused(message, outputs), None), gradients)
    return jax.lax.platform_dependent(*arguments, default=refuse, **{platform: function})


def _refused(message, like):
    """Arrays with the shapes and dtypes of `like`, from a primitive that raises `message` when it is lowered or run."""
    shapes, structure = jax.tree.flatten(like)
    out = _refusal.bind(message=message, shapes=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes))
    return jax.tree.unflatten(structure, out)
