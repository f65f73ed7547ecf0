"""Backwards written by hand, which have no derivative of their own and say so.

jax.custom_vjp differentiates whatever a backward happens to compute: without a word where that goes through, which
nobody has checked, and far from the cause where it does not, as in a loop of unknown length or a kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax


def hand_written(name: str | Callable[..., str], instead: str | Callable[..., str]):
    """Decorates backward(plan, residuals, cotangents): its own derivative raises NotImplementedError.

    `name` is the implementation's; `instead` says which have the derivative. Either may be a function of the plan.
    """

    def decorate(backward):
        once = functools.partial(jax.custom_jvp, nondiff_argnums=(0,))(backward)

        @once.defjvp
        def no_second_derivative(plan, primals, tangents):
            implementation, others = (said(plan) if callable(said) else said for said in (name, instead))
            raise NotImplementedError(
                f"implementation={implementation!r} has a hand-written backward and no second derivative: use {others}"
            )

        return once

    return decorate
