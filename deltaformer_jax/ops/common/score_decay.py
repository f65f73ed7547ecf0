"""The forgetting gate of softmax attention: the decay D that is added to the scores, tile by tile, and its gradient.

    s_ij = scale · q_i·k_j + D_ij,      D_ij = Σ_{j<l≤i} g_l,      g ≤ 0 the log decay of a token

D is never computed as a difference of long cumulative sums: with strong decay the difference would lose all digits.
Between two chunks, D is the sum of three non-positive parts,

    D_ij = (Σ of g from i's chunk's start to i) + (Σ over the whole chunks between) + (Σ of g after j in j's chunk)

Inside a chunk, D is a separate cumulative sum for each j. The gradient of g_l sums over all pairs j < l ≤ i:

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
    """The parts of D, for G key heads with r query heads each.

    log_decay [B, G, T, r]; prefix [B, G, T, r], the sum from the chunk's start to each token; suffix [B, G, T, r], the
    sum after each token to the chunk's end; between [B, G, T/C, T/C, r], the sum over the whole chunks between two.
    """

    log_decay: jax.Array
    prefix: jax.Array
    suffix: jax.Array
    between: jax.Array


def decay_between(log_decay):
    """D [N, N, …] of log_decay [N, …]: D_ij = Σ_{j<l≤i} g_l for j < i, 0 elsewhere."""
    time = log_decay.shape[0]
    index = jnp.arange(time, dtype=jnp.int32)
    after = index[:, None] > index[None, :]
    after = after.reshape(time, time, *[1] * (log_decay.ndim - 1))
    return jnp.cumsum(jnp.where(after, log_decay[:, None], 0), axis=0)


def decay_inside(log_decay):
    """`decay_between` for log_decay [B, G, N, r]: D [B, G, N, N, r]."""
    return jnp.moveaxis(decay_between(jnp.moveaxis(log_decay, 2, 0)), (0, 1), (2, 3))


def score_decay(log_decay, chunk) -> ScoreDecay | None:
    """The parts of D for log_decay [B, G, T, r] in the accumulation dtype. Memory per key head: (T/C)² r + O(T r)
    numbers."""
    if log_decay is None:
        return None
    batch, heads, _, group = log_decay.shape
    blocks = log_decay.reshape(batch, heads, -1, chunk, group)
    prefix = jnp.cumsum(blocks, axis=3)
    suffix = lax.cumsum(blocks, axis=3, reverse=True) - blocks
    between = totals_between(prefix[:, :, :, -1])
    return ScoreDecay(log_decay, prefix.reshape(log_decay.shape), suffix.reshape(log_decay.shape), between)


def totals_between(totals):
    """[B, G, n, n, r] from the chunks' sums of log decays [B, G, n, r]: entry [i, j] sums those of the chunks after j
    and before i. It is D of the totals, shifted by one chunk, because chunk i's own total is not included."""
    index = jnp.arange(totals.shape[2], dtype=jnp.int32)
    before = (index[:, None] - 1 > index[None, :])[None, None, :, :, None]
    previous = jnp.concatenate([jnp.zeros_like(totals[:, :, :1]), totals[:, :, :-1]], axis=2)
    return jnp.cumsum(jnp.where(before, previous[:, :, :, None], 0), axis=2)


def add_decay(scores, decay: ScoreDecay | None, i, j, chunk, diagonal):
    """scores [B, G, C·r, C] of row chunk i and column chunk j, plus D. `diagonal` says that i = j."""
    if decay is None:
        return scores
    if diagonal:
        bias = jnp.swapaxes(decay_inside(tiles.take(decay.log_decay, i, chunk)), 3, 4)
    else:
        at = lambda x, index: lax.dynamic_index_in_dim(x, index, axis=2, keepdims=False)
        rows = tiles.take(decay.prefix, i, chunk) + at(at(decay.between, i), j)[:, :, None]
        bias = rows[..., None] + jnp.swapaxes(tiles.take(decay.suffix, j, chunk), 2, 3)[:, :, None]
    return scores + bias.reshape(scores.shape)


def log_decay_gradient(row_sums, column_sums):
    """dg [B, G, T, r] from the row and column sums of dD, of the same shape."""
    return lax.cumsum(row_sums - column_sums, axis=2, reverse=True)
