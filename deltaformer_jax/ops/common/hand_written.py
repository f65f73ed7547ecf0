"""Hand-written backward passes: what they keep under rematerialisation, and a clear error for a second derivative.

Without that error, JAX would differentiate the code of the backward pass. Either that works, with a second derivative
that no test checks; or it fails inside the code, for example in a loop of unknown length or in a kernel, with an error
that does not name the cause.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.transform import MADE


def made(tree):
    """`tree`, arrays that an op's forward pass computed, under the name MADE.

    By that name `jax.checkpoint_policies.save_only_these_names` keeps them, and only the op's inputs are recomputed.
    Outputs and residuals must get the
    name inside the forward rule. Named outside, the output would be kept, but the forward pass would run again for the
    residuals. An array that is both an output and a residual is named, and kept, once.
    """
    named = {}

    def name(x):
        if id(x) not in named:
            named[id(x)] = checkpoint_name(x, MADE)
        return named[id(x)]

    return jax.tree.map(name, tree)


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
