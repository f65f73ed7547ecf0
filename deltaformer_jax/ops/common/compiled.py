"""Compiles the body of an op, which runs after its argument checks, once per shape, also outside the user's jit."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax


def compiled(static_arguments: int, forward_mode: str = "'recurrent' or 'parallel'") -> Callable:
    """Decorates body(*static, *arrays) with jax.jit; the first `static_arguments` arguments are static.

    Implementations with a hand-written backward pass have no forward-mode derivative. JAX's error about that is
    replaced by one that names the implementations that have it, `forward_mode`. Under an outer jit the error remains
    JAX's own, because JAX raises it after this function has returned.
    """

    def decorate(body):
        once = jax.jit(body, static_argnums=tuple(range(static_arguments)))

        @functools.wraps(body)
        def call(*arguments):
            try:
                return once(*arguments)
            except TypeError as error:
                if "custom_vjp" not in str(error) or "forward-mode" not in str(error):
                    raise
                raise NotImplementedError(
                    "this implementation has a hand-written backward pass and no forward-mode derivative (jax.jvp, "
                    f"jax.jacfwd, jax.hessian): use implementation={forward_mode}, or jax.grad, jax.vjp, jax.jacrev"
                ) from error

        return call

    return decorate
