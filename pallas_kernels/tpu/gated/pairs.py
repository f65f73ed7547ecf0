"""Everything in a chunk of one head that does not depend on the state: decayed scores, decayed reads and writes.

With D_ij = Σ_{j<l≤i} g_l the log decay between two tokens of a chunk,

    kk_ij = k_i · (e^{D_ij} ⊙ k_j)  for j < i,      qk_ij = q_i · (e^{D_ij} ⊙ k_j)  for j ≤ i
    k_reads, q_reads = e^{D_i,start} ⊙ (k_i, q_i)   multiply the state that enters the chunk
    writes_j = e^{D_end,j} ⊙ k_j                    the keys, decayed to the chunk's end
    total = e^{D_end,start}                         the decay of the state over the whole chunk

Each D is a sum of gates, never a difference of cumulative sums. No exponent is positive. Masks are applied before
exponentials. Pairs of tokens of different segments are 0, and so are reads and writes across segments.

A decay per channel is inside the dot product. For rows and columns of two neighbouring blocks of b rows, the border
between the blocks is the reference: x_i · (e^{D_ij} ⊙ k_j) = (e^{D_i,border} ⊙ x_i) · (e^{D_border,j} ⊙ k_j), for
b = SUB, 2 SUB, … Inside blocks of SUB rows, the pairs are computed with one exponential per pair and channel, one
diagonal after another. Source of the reference rows: Yang et al., Gated Linear Attention, arXiv 2312.06635.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.gated.differentiable import (
    block_of,
    down,
    place_in_block,
    product,
    sums_of_columns,
    sums_of_rows,
)

# With a decay per channel: rows of the blocks whose pairs are computed one by one. It is the number of sublanes of a
# vector register.
SUB = 8


class Pairs(NamedTuple):
    """The arrays defined above, float32: kk, qk [C,C], k_reads, q_reads, writes [C,K], total [1,1], [1,K] or None. kk
    and k_reads are None without the delta rule; total is None without decay and segments."""

    kk: jax.Array | None
    qk: jax.Array
    k_reads: jax.Array | None
    q_reads: jax.Array
    writes: jax.Array
    total: jax.Array | None


class Segments:
    """The segment masks of a chunk. `row` [1,C] is, for each token, the number of resets in the chunk up to it; None
    without segments."""

    def __init__(self, row):
        self.local = row is not None
        if self.local:
            chunk = row.shape[1]
            column = row[0][:, None]
            self.same = column == row
            self.first = column == 0
            self.last = column == row[:, chunk - 1 :]
            self.whole = row[:, chunk - 1 :] == 0

    def keep(self, name, x):
        """x where the mask `name` holds, else 0.

        same: both tokens are in one segment. first: the token is in the segment that enters the chunk. last: the token
        is in the segment that leaves the chunk. whole: one segment enters and leaves the chunk.
        """
        return jnp.where(getattr(self, name), x, 0.0) if self.local else x


@functools.partial(jax.jit, static_argnums=(4, 5))
def head_pairs(k, q, g, local, operand, delta: bool) -> Pairs:
    """Pairs with one decay per head, or none: k, q [C,K] float32, g [1,C] or None, local [1,C] int32 or None (the `row`
    of Segments). `operand`: the dtype of operands. Jitted, so that it is traced once for all chunks."""
    chunk, segments = k.shape[0], Segments(local)
    row = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)
    column = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)
    kk, qk = (product(k, k, operand) if delta else None), product(q, k, operand)
    enter = leave = total = None
    if g is not None:
        until = jnp.where(column <= row, g, 0.0)
        decay = jnp.exp(sums_of_columns(until, row > column))
        kk, qk = kk * decay if delta else None, qk * decay
        enter = jnp.exp(jnp.sum(until, axis=1, keepdims=True))
        leave = jnp.exp(jnp.sum(jnp.where(column > row, g, 0.0), axis=1, keepdims=True))
        total = jnp.exp(jnp.sum(g, axis=1, keepdims=True))
    elif segments.local:
        enter = leave = jnp.ones((chunk, 1), jnp.float32)
        total = jnp.ones((1, 1), jnp.float32)
    if enter is not None:
        enter, leave = segments.keep("first", enter), segments.keep("last", leave)
        total = segments.keep("whole", total)
    times = lambda x, factor: x if factor is None else factor * x
    return Pairs(
        segments.keep("same", jnp.where(row > column, kk, 0.0)) if delta else None,
        segments.keep("same", jnp.where(row >= column, qk, 0.0)),
        times(k, enter) if delta else None,
        times(q, enter),
        times(k, leave),
        total,
    )


@functools.partial(jax.jit, static_argnums=(4, 5))
def channel_pairs(k, q, g, local, operand, delta: bool) -> Pairs:
    """Pairs with a decay per channel: k, q, g [C,K] float32, C a power of two of at least SUB. Other arguments as in
    `head_pairs`."""
    chunk, segments = k.shape[0], Segments(local)
    row = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)
    column = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)
    kk, qk = _near_pairs(k, q, g, delta)
    b = SUB
    while b < chunk:
        until, after = _sums(g, row, column, b)
        rows, columns = jnp.exp(until), jnp.exp(after) * k
        meet = (block_of(row, 2 * b) == block_of(column, 2 * b)) & (block_of(row, b) > block_of(column, b))
        if delta:
            kk = kk + jnp.where(meet, product(rows * k, columns, operand), 0.0)
        qk = qk + jnp.where(meet, product(rows * q, columns, operand), 0.0)
        b *= 2
    until, after = _sums(g, row, column, chunk)
    enter, leave = segments.keep("first", jnp.exp(until)), segments.keep("last", jnp.exp(after))
    return Pairs(
        segments.keep("same", kk) if delta else None,
        segments.keep("same", qk),
        enter * k if delta else None,
        enter * q,
        leave * k,
        segments.keep("whole", jnp.exp(jnp.sum(g, axis=0, keepdims=True))),
    )


def _sums(g, row, column, b):
    """(until, after), both [C,K]: the sums of the gates in a token's block of b rows, up to the token and after it."""
    same = block_of(row, b) == block_of(column, b)
    return sums_of_rows(same & (column <= row), g), sums_of_rows(same & (column > row), g)


def _near_pairs(k, q, g, delta):
    """(kk, qk) within blocks of SUB rows, 0 elsewhere. For each distance d, the loop takes the pairs of all rows with
    the d-th row before them."""
    chunk = k.shape[0]
    row = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)
    column = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)
    between = jnp.zeros_like(g)
    zero = jnp.zeros((chunk, chunk), jnp.float32)
    kk, qk = (zero if delta else None), zero
    for d in range(SUB):
        # For a row whose d-th row before is in another block, `between` is a sum of other gates. It is not positive, so
        # that exp cannot overflow, and its pair is masked.
        if d > 0:
            between = between + (g if d == 1 else down(g, d - 1))
        here = (row - column == d) & (place_in_block(row, SUB) >= d)
        far = k if d == 0 else jnp.exp(between) * down(k, d)
        if delta and d > 0:
            kk = kk + jnp.where(here, jnp.sum(k * far, axis=1, keepdims=True), 0.0)
        qk = qk + jnp.where(here, jnp.sum(q * far, axis=1, keepdims=True), 0.0)
    return kk, qk
