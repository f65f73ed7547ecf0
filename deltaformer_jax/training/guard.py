"""The guard against bad batches: which updates are made and which are skipped.

    skip  if  not finite(loss),  or  not finite(n),  or  n > m + d · max(s, m/20)  after the first 20 updates

n is the norm of the gradient. m and s are the mean and standard deviation of n over the updates that were made,
exponentially weighted over about the last 50. d = optimizer.skip_deviations. A skipped step changes neither parameters
nor optimiser, nor m and s: with its norm in them, similar steps would pass or, after a NaN, all steps be skipped.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Updates before norms are compared: the norms of the first ones fall from step to step in any run.
WARM = 20
# The weight of the newest step in the mean and the variance.
NEWEST = 0.02
# The least standard deviation, as a fraction of the mean. Without it, if norms hardly vary, a step with a slightly
# larger norm would be skipped.
LEAST = 0.05


class Guard(NamedTuple):
    """Scalars in the training state.

    int32: made, the updates made; skipped, the steps skipped in all; in_a_row, the newest steps skipped in a row.
    float32: mean and variance of the gradient norms.
    """

    made: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array
    mean: jax.Array
    variance: jax.Array


def new_guard() -> Guard:
    count, number = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    return Guard(count, count, count, number, number)


def good(guard: Guard, loss: jax.Array, norm: jax.Array, deviations: float) -> jax.Array:
    """bool []: whether to make the update. With `deviations` 0 every finite one is made."""
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    if deviations == 0:
        return finite
    spread = jnp.maximum(jnp.sqrt(guard.variance), LEAST * guard.mean)
    return finite & ((guard.made < WARM) | (norm <= guard.mean + deviations * spread))


def after(guard: Guard, ok: jax.Array, norm: jax.Array) -> Guard:
    """The guard after a step whose update was made (`ok`) or skipped."""
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
