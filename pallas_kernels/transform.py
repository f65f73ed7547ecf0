"""What vmap and derivatives make of a function that calls kernels, which have neither."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def _in_usual_arithmetic(function, *arguments):
    """`function` under JAX's defaults. Kernels hold 32-bit numbers at most: under `jax_enable_x64` Python's integers
    would be 64-bit in them, and the stricter rules of promotion are for users' own code."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return function(*arguments)


def transformable(function, name: str, instead: str):
    """`function` with its batch folded under vmap, and a clear error under jvp. All arrays lead with the batch.

    `name` says what it is; `instead` which implementations of the op have the derivatives.
    """
    batched = jax.custom_batching.custom_vmap(functools.partial(_in_usual_arithmetic, function))

    @batched.def_vmap
    def fold(size, in_batched, *arguments):
        spread = lambda x, there: x if there else jnp.broadcast_to(x, (size, *x.shape))
        folded = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.tree.map(spread, arguments, tuple(in_batched)))
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), batched(*folded))
        return out, jax.tree.map(lambda _: True, out)

    wrapped = jax.custom_jvp(lambda *arguments: batched(*arguments))

    @wrapped.defjvp
    def no_derivative(primals, tangents):
        raise NotImplementedError(
            f"{name} has a hand-written backward and no second derivative, nor one in forward mode: use "
            f"implementation={instead}"
        )

    return wrapped
