"""What the decays of a chunk do to its pairs of tokens, and to what enters and leaves it. Many chunks at a time.

With D_ij = Σ_{j<l≤i} g_l the log decay between two tokens of a chunk,

    scores_ij = x_i · (e^{D_ij} ⊙ k_j)  for j ≤ i          x a row: a key (what is deleted) or a query (what is read)
    reads     e^{D_i,start} ⊙ x_i                          what x_i sees of the state that enters the chunk
    writes    e^{D_end,j} ⊙ k_j                            what is left of k_j in the state that leaves it
    total     e^{D_end,start}                              what is left of the state itself

Each D is a sum of gates, never a difference of cumulative sums, which after a strong decay would have lost the digits
of the weak ones; and no exponent is positive, so that e^D underflows to 0 where it should and nothing overflows.
Tokens of different segments have a score of 0.

One decay a head multiplies the products: [C, C] numbers e^D. A decay of each channel sits inside the product, and goes
there by halves: rows of a chunk's later half and columns of its earlier half meet at the border between the two,

    x_i · (e^{D_ij} ⊙ k_j) = (e^{D_i,border} ⊙ x_i) · (e^{D_border,j} ⊙ k_j),      both exponents ≤ 0,

and the same again in each half, down to single tokens: log₂ C products of ever smaller blocks, 2 log₂ C exponentials a
token and channel at most, and sums D that grow from level to level. Source of the reference rows: Yang et al., Gated
Linear Attention, arXiv 2312.06635; taken to single tokens here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common.triangular import halves, join_blocks


class Pairs(NamedTuple):
    """Of chunks "...": with a decay of each channel `enter` and `leave` are in the arrays and these two are None, as
    they are where nothing decays. Without the delta rule nothing reads keys, and `kk` and `k_reads` are None.

    kk, qk [..., C, C], k_reads, q_reads, writes [..., C, K], enter, leave [..., C], total None or [..., 1, 1] or
    [..., K, 1].
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
    """One decay a head, or none: k, q [..., C, K], log_decay [..., C] or None, local [..., C] or None.

    `local` counts the segments that have begun in the chunk, up to each token.
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
    """A decay of each channel: k, q, log_decay [B, h, n, C, K], local [B, 1, n, C] or None. C is a power of two."""
    batch, heads, _, chunk, width = k.shape
    # The axis of chunks counts blocks of b tokens here: [B, h, n C/b, b, ...].
    blocks = lambda x, b: x.reshape(batch, heads, -1, b, width)
    own = lambda x: row_dots(x, k).reshape(batch, heads, -1, 1, 1)
    kk, qk = (own(k) if delta else None), own(q)
    # The sums of a block's gates up to each token, and of those after it.
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
    """An einsum whose float32 is float32 on every platform."""
    return jnp.einsum(equation, a, b, precision=lax.Precision.HIGHEST)


def row_dots(a, b):
    """[..., C] of two [..., C, K]: a product batched over rows, on a CPU many times faster than summed products."""
    return dot("...k,...k->...", a, b)


def _at_or_below(chunk):
    index = jnp.arange(chunk, dtype=jnp.int32)
    return index[:, None] >= index[None, :]


def _same_segment(local):
    return local[..., :, None] == local[..., None, :]


def _between(log_decay):
    """D [..., C, C] of log_decay [..., C], 0 for j ≥ i: a product with ones, each D a sum over its own gates."""
    causal = _at_or_below(log_decay.shape[-1])
    until = _keep(causal, log_decay[..., None, :])
    return dot("...il,lj->...ij", until, (~causal.T).astype(log_decay.dtype))


def _keep(visible, x):
    """x where visible, 0 elsewhere, broadcast; None stays None."""
    if x is None:
        return None
    shape = jnp.broadcast_shapes(visible.shape, x.shape)
    return jnp.where(jnp.broadcast_to(visible, shape), jnp.broadcast_to(x, shape), jnp.zeros((), x.dtype))
