"""(I + A)⁻¹ of a strictly lower triangular tile A. It is an inverse and not a solve, because forward and backward pass
multiply it by many right-hand sides.

Diagonal blocks of 16 rows are inverted by substitution on the vector unit, all blocks side by side in one [16, C] tile:
X ← X − A_·j X_j, column after column. Then pairs of blocks of b rows are joined to blocks of 2b rows by X ← X − X L X,
on the matrix unit; L is the part of A between the two blocks. No power of A is formed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.gated.differentiable import block_of, dot_exact, place_in_block

BLOCK = 16
SUBLANES = 8


# Jitted, so that JAX traces it once for all kernels that call it.
@functools.partial(jax.jit, static_argnums=1)
def inverses(tiles, dtype):
    """The inverses of I + A for each A of the list `tiles`: a list of [C, C] float32.

    Each A is [C, C], C a power of two of at least 16, and 0 on and above the diagonal. Each step is done for all tiles
    before the next step, so that the products of different tiles overlap; those of one tile wait for each other.
    `dtype` is that of the call's inputs; it sets the accuracy of the products (`dot_exact`).
    """
    size = tiles[0].shape[0]
    row = lax.broadcasted_iota(jnp.int32, (size, size), 0)
    column = lax.broadcasted_iota(jnp.int32, (size, size), 1)
    apart = lambda b: block_of(row, b) != block_of(column, b)
    blocks = [_inverse_blocks(jnp.where(apart(BLOCK), 0.0, a)) for a in tiles]
    found = [jnp.where(apart(BLOCK), 0.0, jnp.concatenate([x] * (size // BLOCK))) for x in blocks]
    b = BLOCK
    while b < size:
        joins = [jnp.where(apart(b) & ~apart(2 * b), a, 0.0) for a in tiles]
        steps = [dot_exact(l, x, dtype) for l, x in zip(joins, found)]
        found = [x - dot_exact(x, step, dtype) for x, step in zip(found, steps)]
        b *= 2
    return found


@jax.jit
def _inverse_blocks(blocks):
    """[16, C]: the inverses of I + b for each diagonal 16 × 16 block b of `blocks` [C, C], side by side. `blocks` is 0
    outside the diagonal blocks."""
    size = blocks.shape[0]
    packed = sum(blocks[i : i + BLOCK] for i in range(0, size, BLOCK))
    parts = [packed[i : i + SUBLANES] for i in range(0, BLOCK, SUBLANES)]
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, size), 1)
    row = lax.broadcasted_iota(jnp.int32, (SUBLANES, size), 0)
    first = lane - place_in_block(lane, BLOCK)
    x = [jnp.where(place_in_block(lane, BLOCK) == row + i, 1.0, 0.0) for i in range(0, BLOCK, SUBLANES)]
    for j in range(BLOCK - 1):
        done = x[j // SUBLANES][j % SUBLANES : j % SUBLANES + 1]
        for t in range((j + 1) // SUBLANES, BLOCK // SUBLANES):
            # The gather puts column j of each block into all lanes of the block. It is 0 in rows 0 … j.
            x[t] = x[t] - _lanes(parts[t], first + j) * done
    return jnp.concatenate(x)


@jax.jit
def _lanes(x, index):
    return jnp.take_along_axis(x, index, axis=1)
