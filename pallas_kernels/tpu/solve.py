"""x with (I + A) x = b or (I + A)ᵀ x = b for a strictly lower triangular tile A.

32-row diagonal blocks are inverted all at once by the ladder X ← X − X L X (L the part of A that joins blocks of b
into blocks of 2b rows), which never forms a power of A; the rest is substitution, block by block.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.products import BATCHED, NN, TN, dot

BLOCK = 32


def block_inverses(a, dtype):
    """[C/32, 32, 32]: the inverses of the diagonal blocks of I + A, a [C, C]; what is not below the diagonal is not
    read. Products take operands of `dtype`."""
    size = a.shape[0]
    blocks = jnp.stack([a[i : i + BLOCK, i : i + BLOCK] for i in range(0, size, BLOCK)])
    row = lax.broadcasted_iota(jnp.int32, blocks.shape, 1)
    column = lax.broadcasted_iota(jnp.int32, blocks.shape, 2)
    identity = jnp.where(row == column, 1.0, 0.0)
    inverse = identity - jnp.where((row // 2 == column // 2) & (row > column), blocks, 0.0)
    b = 2
    while b < BLOCK:
        joins = (row // (2 * b) == column // (2 * b)) & (row // b > column // b)
        step = dot(jnp.where(joins, blocks, 0.0), inverse, dtype, BATCHED)
        inverse = inverse - dot(inverse, step, dtype, BATCHED)
        b *= 2
    return inverse


def solve(a, b, dtype):
    """(I + A) x = b, a [C, C] with C a multiple of 32, b [C, V]: from the first block on."""
    inverses = block_inverses(a, dtype)
    parts = []
    for i in range(a.shape[0] // BLOCK):
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        rest = b[rows]
        if parts:
            rest = rest - dot(a[rows, : i * BLOCK], jnp.concatenate(parts), dtype, NN)
        parts.append(dot(inverses[i], rest, dtype, NN))
    return jnp.concatenate(parts)


def solve_transposed(a, b, dtype):
    """(I + A)ᵀ x = b: from the last block back."""
    inverses = block_inverses(a, dtype)
    parts = []
    for i in reversed(range(a.shape[0] // BLOCK)):
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        rest = b[rows]
        if parts:
            rest = rest - dot(a[rows.stop :, rows], jnp.concatenate(parts), dtype, TN)
        parts.insert(0, dot(inverses[i], rest, dtype, TN))
    return jnp.concatenate(parts)
