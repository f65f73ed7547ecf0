"""Gives functions that call kernels a vmap rule, a clear error if they are differentiated, and results a name."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp

# The name of what an op's forward pass computed, for `jax.checkpoint_policies.save_only_these_names(MADE)`.
MADE = "made by an op"


@contextlib.contextmanager
def usual_arithmetic():
    """JAX's default settings, whatever the user has set.

    Kernels use at most 32-bit numbers, but under `jax_enable_x64` Python integers in them would become 64-bit. The
    stricter promotion rules are meant for the user's own code.
    """
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _in_usual_arithmetic(function, *arguments):
    with usual_arithmetic():
        return function(*arguments)


def transformable(function, name: str, instead: str):
    """`function`, which under vmap folds the mapped axis into the batch and under jvp raises NotImplementedError.

    The first axis of all its arrays is the batch. `name` names the function in the error; `instead` names the
    implementations of the op that have the derivatives.
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
            f"{name} has a hand-written backward pass and no second derivative and no forward-mode derivative: use "
            f"implementation={instead}"
        )

    return wrapped
