"""What vmap and derivatives make of a function that calls kernels, which have neither."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def transformable(function, name: str, instead: str):
    """`function` with its batch folded under vmap, and a clear error under jvp. All arrays lead with the batch.

    `name` says what it is; `instead` which implementations of the op have the derivatives.
    """
    batched = jax.custom_batching.custom_vmap(function)

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
