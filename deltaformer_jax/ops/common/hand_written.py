"""Hand-written backward passes, which have no derivative of their own and raise a clear error if one is asked for.

Without this, JAX would differentiate the code of the backward pass. Either that works, with a second derivative that no
test checks; or it fails inside the code, for example in a loop of unknown length or in a kernel, with an error that
does not name the cause.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax


def hand_written(name: str | Callable[..., str], instead: str | Callable[..., str]):
    """Decorates backward(plan, residuals, cotangents) so that differentiating it raises NotImplementedError.

    `name` is the implementation's name. `instead` says which implementations have the second derivative. Either may be
    a function of the plan.
    """

    def decorate(backward):
        once = functools.partial(jax.custom_jvp, nondiff_argnums=(0,))(backward)

        @once.defjvp
        def no_second_derivative(plan, primals, tangents):
            implementation, others = (said(plan) if callable(said) else said for said in (name, instead))
            raise NotImplementedError(
                f"implementation={implementation!r} has a hand-written backward pass and no second derivative: use "
                f"{others}"
            )

        return once

    return decorate
