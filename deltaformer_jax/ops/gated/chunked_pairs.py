"""Everything in a chunk that does not depend on the state: decayed scores between its tokens, decayed reads and writes.
The functions process many chunks at once.

With D_ij = Σ_{j<l≤i} g_l the log decay between two tokens of a chunk, and x_i a key (for the deletion) or a query (for
the read),

    scores_ij = x_i · (e^{D_ij} ⊙ k_j)  for j ≤ i          kk and qk: scores of keys and of queries with keys
    reads     e^{D_i,start} ⊙ x_i                          multiply the state that enters the chunk
    writes    e^{D_end,j} ⊙ k_j                            the keys, decayed to the chunk's end
    total     e^{D_end,start}                              the decay of the state over the whole chunk

Each D is a sum of gates, never a difference of cumulative sums: after a strong decay, a difference would have lost the
digits of the weak decays. No exponent is positive, so e^D may underflow to 0 but cannot overflow. Tokens of different
segments have the score 0.

One decay per head multiplies the products: e^D is a [C, C] matrix. A decay per channel is inside the product. It is
applied by halves. For rows in the later half of a chunk and columns in the earlier half, the border between the halves
is the reference:

    x_i · (e^{D_ij} ⊙ k_j) = (e^{D_i,border} ⊙ x_i) · (e^{D_border,j} ⊙ k_j),      both exponents ≤ 0

The same step is applied inside each half, down to single tokens. This takes log₂ C products of ever smaller blocks, and
at most 2 log₂ C exponentials per token and channel. The sums D are extended from level to level. Source of the
reference rows: Yang et al., Gated Linear Attention, arXiv 2312.06635; applied down to single tokens here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common.triangular import halves, join_blocks


class Pairs(NamedTuple):
    """The state-independent arrays of chunks with leading axes "...", as defined above.

    kk, qk [..., C, C]; k_reads, q_reads, writes [..., C, K]; enter, leave [..., C] or None; total [..., 1, 1],
    [..., K, 1] or None.

    With one decay per head, `enter` and `leave` are the factors e^D of the reads and of the writes, not yet applied to
    the arrays. With a decay per channel they are applied already, and both are None. Without decay and segments,
    `enter`, `leave` and `total` are None. Without the delta rule, keys read nothing, and `kk` and `k_reads` are None.
    """

    kk: jax.Array | None
    qk: jax.Array
    k_reads: jax.Array | None
    q_reads: jax.Array
    writes: jax.Array
    enter: jax.Array | None
    leave: jax.Array | None
    total: jax.Array | None


def head_pairs(k, q, log_decay, local, delta) -> Pairs:
    """Pairs with one decay per head, or none: k, q [..., C, K], log_decay [..., C] or None, local [..., C] or None.

    `local` is, for each token, the number of resets in the chunk up to it. Tokens with equal `local` are in one
    segment.
    """
    chunk = k.shape[-2]
    causal = _at_or_below(chunk)
    kk, qk = (dot("...ik,...jk->...ij", k, k) if delta else None), dot("...ik,...jk->...ij", q, k)
    k_reads = k if delta else None
    if log_decay is None and local is None:
        return Pairs(_keep(causal, kk), _keep(causal, qk), k_reads, q, k, None, None, None)
    if log_decay is None:
        log_decay = jnp.zeros(k.shape[:-1], k.dtype)
    later = jnp.concatenate([log_decay[..., 1:], jnp.zeros_like(log_decay[..., :1])], axis=-1)
    between = jnp.exp(_between(log_decay))
    enter = jnp.exp(jnp.cumsum(log_decay, axis=-1))
    leave = jnp.exp(lax.cumsum(later, axis=later.ndim - 1, reverse=True))
    total = enter[..., -1:, None]
    if local is None:
        between = _keep(causal, between)
    else:
        first, last = local == 0, local == local[..., -1:]
        between = _keep(_keep(causal, _same_segment(local)), between)
        enter, leave, total = _keep(first, enter), _keep(last, leave), _keep(first[..., -1:, None], total)
    kk = kk * between if delta else None
    return Pairs(kk, qk * between, k_reads, q, k, enter, leave, total)


def channel_pairs(k, q, log_decay, local, delta) -> Pairs:
    """Pairs with a decay per channel: k, q, log_decay [B, h, n, C, K], local [B, 1, n, C] or None; C a power of two."""
    batch, heads, _, chunk, width = k.shape
    # Here the axis of chunks is an axis of blocks of b tokens: [B, h, n C/b, b, ...].
    blocks = lambda x, b: x.reshape(batch, heads, -1, b, width)
    own = lambda x: row_dots(x, k).reshape(batch, heads, -1, 1, 1)
    kk, qk = (own(k) if delta else None), own(q)
    # until: the sum of a block's log decays up to each token, itself included. after: the sum of those after it.
    until = blocks(log_decay, 1)
    after = jnp.zeros_like(until)
    b = 1
    while b < chunk:
        (first, second), (first_after, second_after) = halves(until), halves(after)
        rows, columns = jnp.exp(second), jnp.exp(first_after) * halves(blocks(k, b))[0]
        if delta:
            kk = join_blocks(kk, dot("...ik,...jk->...ij", rows * halves(blocks(k, b))[1], columns))
        qk = join_blocks(qk, dot("...ik,...jk->...ij", rows * halves(blocks(q, b))[1], columns))
        until = jnp.concatenate([first, second + first[..., -1:, :]], axis=-2)
        after = jnp.concatenate([first_after + second[..., -1:, :], second_after], axis=-2)
        b *= 2
    enter, leave = jnp.exp(until), jnp.exp(after)
    total = enter[..., -1:, :]
    if local is not None:
        first, last = local == 0, local == local[..., -1:]
        same = _same_segment(local)
        kk, qk = _keep(same, kk), _keep(same, qk)
        enter, leave, total = (
            _keep(seen[..., None], x) for seen, x in ((first, enter), (last, leave), (first[..., -1:], total))
        )
    k_reads = k * enter if delta else None
    return Pairs(kk, qk, k_reads, q * enter, k * leave, None, None, jnp.swapaxes(total, -1, -2))


def dot(equation, a, b):
    """An einsum that multiplies float32 in full float32 on every platform, not in TF32 or bfloat16 passes."""
    return jnp.einsum(equation, a, b, precision=lax.Precision.HIGHEST)


def row_dots(a, b):
    """[..., C], the dot products of the rows of two arrays [..., C, K].

    A product batched over rows; on a CPU it is many times faster than jnp.sum(a * b).
    """
    return dot("...k,...k->...", a, b)


def _at_or_below(chunk):
    index = jnp.arange(chunk, dtype=jnp.int32)
    return index[:, None] >= index[None, :]


def _same_segment(local):
    return local[..., :, None] == local[..., None, :]


def _between(log_decay):
    """D [..., C, C] of log_decay [..., C], 0 for j ≥ i. A product with a matrix of ones, so that each D is a sum of its
    own gates."""
    causal = _at_or_below(log_decay.shape[-1])
    until = _keep(causal, log_decay[..., None, :])
    return dot("...il,lj->...ij", until, (~causal.T).astype(log_decay.dtype))


def _keep(visible, x):
    """x where visible, 0 elsewhere, with broadcasting; None stays None."""
    if x is None:
        return None
    shape = jnp.broadcast_shapes(visible.shape, x.shape)
    return jnp.where(jnp.broadcast_to(visible, shape), jnp.broadcast_to(x, shape), jnp.zeros((), x.dtype))
