"""Padding, where a token's segment id is 0: nothing of it reaches a value or a gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def zero_at_padding(x, real):
    """x [B, T, ...] with zeros where `real` [B, T] is False. None stays None."""
    return None if x is None else jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0)


@jax.custom_jvp
def zero_gradient_at_padding(x, real):
    """x [B, T, ...], which is 0 at padding already. Its derivative is 0 there, so that a cotangent at padding, even
    NaN, goes no further. Unlike `zero_at_padding` it makes no new array."""
    return x


@zero_gradient_at_padding.defjvp
def _derivative(primals, tangents):
    x, real = primals
    return x, zero_at_padding(tangents[0], real)
