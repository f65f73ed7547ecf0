"""The guard against bad batches: which updates are made and which are skipped.

    skip  if  not finite(loss),  or  not finite(n),  or by optimizer.skip

    "deviations":  n > m + d · max(s, m/20)           after the first 20 updates
    "ratio":       n > r · mean(last 100 n) + f       after the first 100 updates, unless q steps in a row were skipped

n is the norm of the gradient. m and s are the mean and standard deviation of n over the updates that were made,
exponentially weighted over about the last 50. d = optimizer.skip_deviations; r, f and q are optimizer.skip_ratio,
skip_floor and skip_in_a_row. A skipped step changes neither parameters nor optimiser, nor the norms that are compared
with: with its norm among them, similar steps would pass or, after a NaN, all steps be skipped.

"ratio" is Baichuan-M1's (arXiv 2502.12671, section 4: 1.2, 0.1 and 1), which calls it adaptive gradient clipping.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltaformer_jax.config import OptimizerConfig

# Updates before norms are compared: the norms of the first ones fall from step to step in any run.
WARM = 20
# The weight of the newest step in the mean and the variance.
NEWEST = 0.02
# The least standard deviation, as a fraction of the mean. Without it, if norms hardly vary, a step with a slightly
# larger norm would be skipped.
LEAST = 0.05


# How many norms "ratio" compares with.
RECENT = 100


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


class RatioGuard(NamedTuple):
    """The guard of "ratio": as `Guard`, and `recent` float32 [RECENT], the norms of the last updates.

    The norm of the next one takes the place made % RECENT. A class of its own, so that the state of "deviations" stays
    what it is in a checkpoint.
    """

    made: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array
    mean: jax.Array
    variance: jax.Array
    recent: jax.Array


def new_guard(skip: str) -> Guard | RatioGuard:
    """The guard before the first step. skip: optimizer.skip."""
    count, number = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    plain = Guard(count, count, count, number, number)
    return RatioGuard(*plain, jnp.zeros(RECENT, jnp.float32)) if skip == "ratio" else plain


def good(guard: Guard | RatioGuard, loss: jax.Array, norm: jax.Array, settings: OptimizerConfig) -> jax.Array:
    """bool []: whether to make the update. With skip_deviations 0 every finite one is made."""
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    if isinstance(guard, RatioGuard):
        usual = norm <= settings.skip_ratio * jnp.mean(guard.recent) + settings.skip_floor
        return finite & (usual | (guard.made < RECENT) | (guard.in_a_row >= settings.skip_in_a_row))
    if settings.skip_deviations == 0:
        return finite
    spread = jnp.maximum(jnp.sqrt(guard.variance), LEAST * guard.mean)
    return finite & ((guard.made < WARM) | (norm <= guard.mean + settings.skip_deviations * spread))


def after(guard: Guard | RatioGuard, ok: jax.Array, norm: jax.Array) -> Guard | RatioGuard:
    """The guard after a step whose update was made (`ok`) or skipped."""
    weight = jnp.maximum(1.0 / (guard.made + 1).astype(jnp.float32), NEWEST)
    distance = norm - guard.mean
    made = guard._replace(
        made=guard.made + 1,
        in_a_row=jnp.zeros_like(guard.in_a_row),
        mean=guard.mean + weight * distance,
        variance=(1 - weight) * (guard.variance + weight * distance**2),
    )
    if isinstance(guard, RatioGuard):
        made = made._replace(recent=guard.recent.at[guard.made % RECENT].set(norm))
    passed = guard._replace(skipped=guard.skipped + 1, in_a_row=guard.in_a_row + 1)
    return jax.tree.map(lambda new, old: jnp.where(ok, new, old), made, passed)
