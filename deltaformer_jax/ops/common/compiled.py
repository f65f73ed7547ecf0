"""The body of an op, behind its checks: compiled once for each shape, also where the op is called outside jit."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax


def compiled(static_arguments: int, forward_mode: str = "'recurrent' or 'parallel'") -> Callable:
    """Decorates body(*static, *arrays): jax.jit, of which the first `static_arguments` arguments are constants.

    Forms with a backward of their own have no derivative in forward mode: JAX's error about that becomes one that names
    the implementations that have, `forward_mode`. Under an outer jit the error is JAX's own: it comes after the op.
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
                    "this implementation has a backward of its own and no derivative in forward mode (jax.jvp, "
                    f"jax.jacfwd, jax.hessian): use implementation={forward_mode}, or jax.grad, jax.vjp, jax.jacrev"
                ) from error

        return call

    return decorate
