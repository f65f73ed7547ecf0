"""Forgetting in softmax attention: what is added to the scores, tile by tile, and the gradient of it.

    s_ij = scale · q_i·k_j + D_ij,      D_ij = Σ_{j<l≤i} g_l,      g ≤ 0 the log decay of a token

D is never a difference of long cumulative sums, which loses every digit under strong decay: between chunks it is the
sum of three non-positive parts,

    D_ij = (Σ of g from i's chunk's start to i) + (Σ over the whole chunks between) + (Σ of g after j in j's chunk)

and inside a chunk it is summed for each j anew. The gradient of g_l gathers every pair that l lies between:

    dg_l = Σ_{j<l≤i} dD_ij = Σ_{i≥l} R_i − Σ_{j≥l} C_j,      R, C the row and column sums of dD

Source: Lin et al., Forgetting Transformer, arXiv 2503.02130, eq. 5 to 7.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common import tiles


class ScoreDecay(NamedTuple):
    """Of one key head with r query heads: log_decay, prefix, suffix [T, r], between [T/C, T/C, r]."""

    log_decay: jax.Array
    prefix: jax.Array
    suffix: jax.Array
    between: jax.Array


def decay_between(log_decay):
    """D [N, N, ...] of log_decay [N, ...]: the sum of what lies after j up to i for j < i, 0 elsewhere."""
    time = log_decay.shape[0]
    index = jnp.arange(time, dtype=jnp.int32)
    after = index[:, None] > index[None, :]
    after = after.reshape(time, time, *[1] * (log_decay.ndim - 1))
    return jnp.cumsum(jnp.where(after, log_decay[:, None], 0), axis=0)


def score_decay(log_decay, chunk) -> ScoreDecay | None:
    """What the tiles need of log_decay [T, r], in the accumulation dtype. (T/C)² r numbers beside O(T r)."""
    if log_decay is None:
        return None
    blocks = log_decay.reshape(-1, chunk, log_decay.shape[1])
    prefix = jnp.cumsum(blocks, axis=1)
    suffix = lax.cumsum(blocks, axis=1, reverse=True) - blocks
    totals = prefix[:, -1]
    # Chunk i's row sums the whole chunks after j and before i.
    index = jnp.arange(totals.shape[0], dtype=jnp.int32)
    before = (index[:, None] - 1 > index[None, :])[..., None]
    previous = jnp.concatenate([jnp.zeros_like(totals[:1]), totals[:-1]])
    between = jnp.cumsum(jnp.where(before, previous[:, None], 0), axis=0)
    return ScoreDecay(log_decay, prefix.reshape(log_decay.shape), suffix.reshape(log_decay.shape), between)


def add_decay(scores, decay: ScoreDecay | None, i, j, chunk, diagonal):
    """scores [C·r, C] of row chunk i and column chunk j, plus D."""
    if decay is None:
        return scores
    if diagonal:
        bias = jnp.moveaxis(decay_between(tiles.take(decay.log_decay, i, chunk)), 1, 2)
    else:
        rows = tiles.take(decay.prefix, i, chunk) + decay.between[i, j][None]
        bias = rows[:, :, None] + tiles.take(decay.suffix, j, chunk).T[None]
    return scores + bias.reshape(scores.shape)


def log_decay_gradient(row_sums, column_sums):
    """dg [T, r] from the row and column sums of dD, each [T, r]."""
    return lax.cumsum(row_sums - column_sums, axis=0, reverse=True)
