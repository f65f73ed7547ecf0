"""Which updates are made and which are skipped: a step whose loss or gradient is not finite, or whose gradient is far
longer than those before it, changes neither parameters nor optimiser.

    skip  if  not finite(loss),  or not finite(n),  or  n > m + d · max(s, m/20)  once 20 steps have been made

n the norm of the gradient, m and s the mean and standard deviation of the norms of the steps that were made (over
about the last 50, exponentially), d = optimizer.skip_deviations. A step that is skipped leaves no trace in m and s:
statistics that had seen it would let others like it pass, or, after a NaN, skip everything.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Steps before norms are compared: the first ones fall by themselves from step to step.
WARM = 20
# The weight of the newest step in the mean and the variance.
NEWEST = 0.02
# The least standard deviation, of the mean: norms that hardly vary are no reason to skip one that is a little longer.
LEAST = 0.05


class Guard(NamedTuple):
    """Scalars that are part of the state. int32: steps made, steps skipped in all, and in a row up to now; float32: the
    mean and the variance of the gradients' norms."""

    made: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array
    mean: jax.Array
    variance: jax.Array


def new_guard() -> Guard:
    count, number = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    return Guard(count, count, count, number, number)


def good(guard: Guard, loss: jax.Array, norm: jax.Array, deviations: float) -> jax.Array:
    """bool []: whether the step is to be made. `deviations` 0 lets every finite one pass."""
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    if deviations == 0:
        return finite
    spread = jnp.maximum(jnp.sqrt(guard.variance), LEAST * guard.mean)
    return finite & ((guard.made < WARM) | (norm <= guard.mean + deviations * spread))


def after(guard: Guard, ok: jax.Array, norm: jax.Array) -> Guard:
    """The guard after a step that was made (`ok`) or skipped."""
    weight = jnp.maximum(1.0 / (guard.made + 1).astype(jnp.float32), NEWEST)
    distance = norm - guard.mean
    made = Guard(
        made=guard.made + 1,
        skipped=guard.skipped,
        in_a_row=jnp.zeros_like(guard.in_a_row),
        mean=guard.mean + weight * distance,
        variance=(1 - weight) * (guard.variance + weight * distance**2),
    )
    passed = guard._replace(skipped=guard.skipped + 1, in_a_row=guard.in_a_row + 1)
    return jax.tree.map(lambda new, old: jnp.where(ok, new, old), made, passed)
