"""What the decays of a chunk do to its pairs of tokens, and to what enters and leaves it; one chunk of one head.

With D_ij = Σ_{j<l≤i} g_l the log decay between two tokens of a chunk,

    kk_ij = k_i · (e^{D_ij} ⊙ k_j)  for j < i,      qk_ij = q_i · (e^{D_ij} ⊙ k_j)  for j ≤ i
    k_reads, q_reads = e^{D_i,start} ⊙ (k_i, q_i)   what they see of the state that enters the chunk
    writes_j = e^{D_end,j} ⊙ k_j                    what is left of k_j in the state that leaves it
    total = e^{D_end,start}                         what is left of the state itself

Each D is a sum of gates, never a difference of cumulative sums; no exponent is positive, and masks come before
exponentials. Tokens of different segments have a pair of 0, and a state is seen and left within its segment only.

A decay of each channel sits inside the product. Rows and columns of two neighbouring blocks of b rows meet at the
border between them, x_i · (e^{D_ij} ⊙ k_j) = (e^{D_i,border} ⊙ x_i) · (e^{D_border,j} ⊙ k_j), for b = SUB, 2 SUB, …;
inside blocks of SUB rows there is an exponential for each pair and channel, one diagonal of pairs after another.
Source of the reference rows: Yang et al., Gated Linear Attention, arXiv 2312.06635.
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

# Rows of the blocks whose pairs of a decay of each channel are made one by one: as many as a tile of registers has.
SUB = 8


class Pairs(NamedTuple):
    """kk (None without the delta rule, as is k_reads), qk [C,C], k_reads, q_reads, writes [C,K], total None, [1,1] or
    [1,K]; float32."""

    kk: jax.Array | None
    qk: jax.Array
    k_reads: jax.Array | None
    q_reads: jax.Array
    writes: jax.Array
    total: jax.Array | None


class Segments:
    """Which of a chunk's tokens see one another; `row` [1,C] counts the segments begun in the chunk, or None."""

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
        """x where `name` (same, first, last, whole) holds."""
        return jnp.where(getattr(self, name), x, 0.0) if self.local else x


@functools.partial(jax.jit, static_argnums=(4, 5))
def head_pairs(k, q, g, local, operand, delta: bool) -> Pairs:
    """One decay a head, or none: k, q [C,K] float32, g [1,C] or None. `local` [1,C] int32 or
    None: the segments begun in the chunk; `operand`: what products round to. Jitted: one trace for all chunks."""
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
    """A decay of each channel: k, q, g [C,K] float32, C a power of two of at least SUB; the rest as above."""
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
    """The sums of the gates of a token's block of b rows, up to it, and after it."""
    same = block_of(row, b) == block_of(column, b)
    return sums_of_rows(same & (column <= row), g), sums_of_rows(same & (column > row), g)


def _near_pairs(k, q, g, delta):
    """kk and qk within blocks of SUB rows, 0 elsewhere: for each distance d all pairs of a row and the d-th before."""
    chunk = k.shape[0]
    row = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)
    column = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)
    between = jnp.zeros_like(g)
    zero = jnp.zeros((chunk, chunk), jnp.float32)
    kk, qk = (zero if delta else None), zero
    for d in range(SUB):
        # Rows whose d-th before is in another block get a sum that nothing reads: of gates too, and so not positive.
        if d > 0:
            between = between + (g if d == 1 else down(g, d - 1))
        here = (row - column == d) & (place_in_block(row, SUB) >= d)
        far = k if d == 0 else jnp.exp(between) * down(k, d)
        if delta and d > 0:
            kk = kk + jnp.where(here, jnp.sum(k * far, axis=1, keepdims=True), 0.0)
        qk = qk + jnp.where(here, jnp.sum(q * far, axis=1, keepdims=True), 0.0)
    return kk, qk
