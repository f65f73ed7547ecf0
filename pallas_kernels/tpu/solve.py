"""Unit triangular systems of a tile's rows, given across: a [columns, rows] = Aᵀ, A strictly lower triangular.

32-row diagonal blocks are inverted all at once by the ladder X ← X − X L X (L the part of Aᵀ that joins blocks of b
into blocks of 2b rows), which never forms a power of A; the rest is substitution, block by block.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.products import BATCHED, NN, NT, dot

BLOCK = 32


def block_inverses(a, dtype):
    """[C/32, 32, 32]: the inverses of the diagonal blocks of I + a, a [C, C] strictly upper triangular; what is not
    above the diagonal is not read. Products take operands of `dtype`."""
    size = a.shape[0]
    blocks = jnp.stack([a[i : i + BLOCK, i : i + BLOCK] for i in range(0, size, BLOCK)])
    row = lax.broadcasted_iota(jnp.int32, blocks.shape, 1)
    column = lax.broadcasted_iota(jnp.int32, blocks.shape, 2)
    identity = jnp.where(row == column, 1.0, 0.0)
    # Where an entry's row and column differ in a bit is the size of the blocks it joins.
    apart, above = row ^ column, row < column
    inverse = identity - jnp.where((apart == 1) & above, blocks, 0.0)
    b = 2
    while b < BLOCK:
        joins = (apart >= b) & (apart < 2 * b) & above
        step = dot(jnp.where(joins, blocks, 0.0), inverse, dtype, BATCHED)
        inverse = inverse - dot(inverse, step, dtype, BATCHED)
        b *= 2
    return inverse


def solve_across(a, b, dtype):
    """x with x (I + a) = b, b [V, C]: xᵀ solves (I + A) xᵀ = bᵀ. From the first block on."""
    inverses = block_inverses(a, dtype)
    parts = []
    for i in range(a.shape[0] // BLOCK):
        own = slice(i * BLOCK, (i + 1) * BLOCK)
        rest = b[:, own]
        if parts:
            rest = rest - dot(jnp.concatenate(parts, axis=1), a[: i * BLOCK, own], dtype, NN)
        parts.append(dot(rest, inverses[i], dtype, NN))
    return jnp.concatenate(parts, axis=1)


def solve_across_transposed(a, b, dtype):
    """x with (I + a) xᵀ = bᵀ, b [V, C]: xᵀ solves (I + A)ᵀ xᵀ = bᵀ. From the last block back."""
    inverses = block_inverses(a, dtype)
    parts = []
    for i in reversed(range(a.shape[0] // BLOCK)):
        own = slice(i * BLOCK, (i + 1) * BLOCK)
        rest = b[:, own]
        if parts:
            rest = rest - dot(jnp.concatenate(parts, axis=1), a[own, own.stop :], dtype, NT)
        parts.insert(0, dot(rest, inverses[i], dtype, NT))
    return jnp.concatenate(parts, axis=1)
